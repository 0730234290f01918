//! Verifies and times one layer in every layout and with every kernel that was asked for.

use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ndarray::{Array4, ArrayD};
#[cfg(feature = "cuda")]
use pointwise::CudaDevice;
use pointwise::reference::{self, Inputs};
use pointwise::{Cost, DType, Device, Layout, PrepareOptions, Prepared, Roof, bf16, f16};

use crate::Result;
use crate::layers::Layer;
use crate::options::{Numbers, Options, Order};
use crate::tensor::{Tensor, Value, repeated, values, zeros};
use crate::verify::{self, Errors};

/// Samples of the roof per layer, each followed by two turns of every contender.
pub const SAMPLES: usize = 5;
/// How long a contender is timed in one turn.
pub const TURN: Duration = Duration::from_millis(15);
/// How long the calls last that are timed as one, so that the clock's own time does not count.
const CALLS: Duration = Duration::from_micros(20);
/// As [`CALLS`], where the end of the calls has to be waited for.
#[cfg(feature = "cuda")]
const QUEUED_CALLS: Duration = Duration::from_millis(1);
/// Samples of a batch that differ; the others repeat them, so that a large batch is verified in
/// the time that the reference takes for a small one.
pub const DISTINCT: usize = 3;
/// A larger fraction of the roof means that the roof is wrong.
const MOST: f64 = 1.02;

/// What all layers share.
pub struct Bench {
    device: Device,
    #[cfg(feature = "cuda")]
    cuda: Option<CudaDevice>,
    /// `cpu` or `cuda:N`.
    pub device_name: String,
    pub threads: usize,
    pub numbers: Numbers,
    orders: Vec<Order>,
    /// `None` is the planner's choice.
    kernels: Vec<Option<String>>,
}

/// What came of a layer.
pub struct Outcome {
    pub rows: Vec<Row>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// What was measured of a layer in one layout and with one kernel.
pub struct Row {
    pub order: Order,
    pub kernel: &'static str,
    /// Whether the kernel was asked for by name.
    pub forced: bool,
    /// In seconds.
    pub median: f64,
    pub min: f64,
    pub cost: Cost,
    pub roof: Roof,
    pub errors: Errors,
    roof_is_measured: bool,
}

impl Row {
    /// A result that has been verified.
    pub fn new(
        order: Order,
        kernel: &'static str,
        median: f64,
        min: f64,
        cost: Cost,
        roof: Roof,
        bench: &Bench,
    ) -> Self {
        let roof_is_measured = bench.device_name == "cpu";
        Row {
            order,
            kernel,
            forced: false,
            median,
            min,
            cost,
            roof,
            errors: Errors::default(),
            roof_is_measured,
        }
    }

    /// Of the roof, in time.
    pub fn peak_fraction(&self) -> f64 {
        self.roof.seconds(&self.cost) / self.median
    }

    /// What is wrong with the roof, if it must be.
    pub fn wrong_roof(&self) -> Option<String> {
        let fraction = self.peak_fraction();
        // A fraction that is not a number is no fit.
        let fits = !self.roof_is_measured || fraction <= MOST;
        let (order, kernel) = (self.order.name(), self.kernel);
        (!fits).then(|| format!("{order} with {kernel} runs at {fraction:.3} of it"))
    }
}

impl Bench {
    pub fn new(options: &Options) -> Result<Self> {
        let device: Device = options.device.parse()?;
        let orders = options.layout.map_or(vec![Order::Nchw, Order::Nhwc], |order| vec![order]);
        let kernels = match options.kernel.as_slice() {
            [] => vec![None],
            kernels => kernels.iter().cloned().map(Some).collect(),
        };
        let mut bench = Bench {
            device,
            #[cfg(feature = "cuda")]
            cuda: None,
            device_name: options.device.clone(),
            threads: 1,
            numbers: options.dtype,
            orders,
            kernels,
        };
        if options.device == "cpu" {
            // A pool of this very size, whatever the machine and RAYON_NUM_THREADS say.
            let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build()?;
            bench.device = Device::cpu_with_pool(Arc::new(pool)).threads(options.threads);
            bench.threads = options.threads;
        }
        #[cfg(feature = "cuda")]
        if options.device != "cpu" {
            let ordinal = options.device.strip_prefix("cuda:").unwrap_or("0").parse()?;
            let cuda = CudaDevice::open(ordinal)?;
            bench.device_name = format!("cuda:{ordinal}");
            bench.device = cuda.clone().into();
            bench.cuda = Some(cuda);
        }
        Ok(bench)
    }

    /// `None` is the planner's choice.
    pub fn kernels(&self) -> &[Option<String>] {
        &self.kernels
    }

    pub fn orders(&self) -> &[Order] {
        &self.orders
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A tensor on the device, in the same memory order.
    pub fn tensor<T: Value>(&self, host: Array4<T>) -> Result<Tensor<T>> {
        let tensor = Tensor::new(host);
        #[cfg(feature = "cuda")]
        if let Some(device) = &self.cuda {
            return tensor.on(device);
        }
        Ok(tensor)
    }

    /// Verifies a layer, times it, and times it once more if it seems to beat the roof: a clock
    /// that rose between the samples may have been to blame.
    ///
    /// # Errors
    /// A result that is wrong, a kernel that the device does not have, the device's errors.
    pub fn measure(&self, layer: &Layer) -> Result<Outcome> {
        let (mut contenders, notes) = self.contenders(layer)?;
        let mut rows = Vec::new();
        for _ in 0..2 {
            contenders.iter_mut().try_for_each(Contender::verify)?;
            rows = self.time(&mut contenders)?;
            // What was timed has to be right as well.
            for (contender, row) in contenders.iter_mut().zip(&mut rows) {
                contender.check()?;
                row.errors = contender.errors;
            }
            if rows.iter().all(|row| row.wrong_roof().is_none()) {
                break;
            }
        }
        Ok(Outcome { rows, notes })
    }

    /// The errors of each contender's result; nothing is timed.
    ///
    /// # Errors
    /// As [`measure`](Self::measure).
    pub fn verify(&self, layer: &Layer) -> Result<Vec<Errors>> {
        let (mut contenders, _) = self.contenders(layer)?;
        contenders.iter_mut().try_for_each(Contender::verify)?;
        Ok(contenders.iter().map(|contender| contender.errors).collect())
    }

    fn contenders(&self, layer: &Layer) -> Result<(Vec<Contender>, Vec<String>)> {
        match self.numbers {
            Numbers::Real(DType::F16) => self.contenders_as::<f16>(layer),
            Numbers::Real(DType::Bf16) => self.contenders_as::<bf16>(layer),
            Numbers::Real(_) => self.contenders_as::<f32>(layer),
            Numbers::Int8 => self.contenders_of_integers(layer),
        }
    }

    fn contenders_as<T: Value>(&self, layer: &Layer) -> Result<(Vec<Contender>, Vec<String>)> {
        let Layer { n, c_in, h, w, .. } = *layer;
        // What the type holds, so that the reference computes with the same.
        let held = values(n.min(DISTINCT), c_in, h, w).mapv(T::from_f32);
        let description = layer.description::<T>()?;
        let distinct = held.mapv(T::to_f32);
        let inputs = Inputs { sources: vec![distinct.view().into_dyn()], ..Inputs::default() };
        let expected = Rc::new(reference::forward(&description, &inputs)?);
        let tolerance =
            verify::tolerance(&description, distinct.view().into_dyn(), expected.view(), T::DTYPE);

        let mut notes = Vec::new();
        let mut contenders = Vec::new();
        for kernel in &self.kernels {
            let options = PrepareOptions { kernel: kernel.clone(), ..PrepareOptions::default() };
            let prepared = description.prepare_as::<T>(&self.device, options)?;
            for &order in &self.orders {
                let plans = prepared.plans_in(&[n, c_in, h, w], layout(order))?;
                let plan = match kernel {
                    // `name/4` names how many blocks share a sum, too.
                    Some(name) => plans.into_iter().find(|plan| {
                        name.strip_prefix(plan.kernel)
                            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                    }),
                    None => plans.into_iter().next(),
                };
                let plan = plan.ok_or("no kernel")?;
                if let Err(why) = plan.verdict {
                    notes.push(format!("{} left out of {}: {why}", plan.kernel, order.name()));
                    continue;
                }
                let dst_shape: [usize; 4] =
                    prepared.dst_shape(&[n, c_in, h, w])?.as_slice().try_into()?;
                let src = self.tensor(repeated(order, held.view(), n))?;
                let dst = self.tensor(zeros(order, dst_shape))?;
                let (prepared, expected) = (prepared.clone(), Rc::clone(&expected));
                contenders.push(Contender {
                    order,
                    kernel: plan.kernel,
                    forced: kernel.is_some(),
                    cost: prepared.cost(&[n, c_in, h, w])?,
                    layer: Box::new(Real { prepared, src, dst, expected, tolerance }),
                    errors: Errors::default(),
                });
            }
        }
        Ok((contenders, notes))
    }

    fn time(&self, contenders: &mut [Contender]) -> Result<Vec<Row>> {
        let Some(first) = contenders.first() else {
            return Ok(Vec::new());
        };
        let bytes = first.cost.bytes();
        let meter = match self.numbers {
            Numbers::Real(dtype) => self.device.roof_meter_as(dtype, bytes)?,
            Numbers::Int8 => self.device.roof_meter_int8(bytes)?,
        };
        let mut roof = meter.sample();
        let mut times = vec![Vec::new(); contenders.len()];
        for sample in 0..SAMPLES {
            if sample > 0 {
                roof = roof.max(meter.sample());
            }
            // Forth and back, so that nobody always follows the roof, or the same neighbour.
            let forth = 0..contenders.len();
            for i in forth.clone().chain(forth.rev()) {
                contenders[i].turn(&mut times[i])?;
            }
        }
        let row = |(contender, times): (&Contender, &mut Vec<f64>)| {
            times.sort_by(f64::total_cmp);
            Row {
                order: contender.order,
                kernel: contender.kernel,
                forced: contender.forced,
                median: times[times.len() / 2],
                min: times[0],
                cost: contender.cost,
                roof,
                errors: contender.errors,
                roof_is_measured: self.device_name == "cpu",
            }
        };
        Ok(contenders.iter().zip(&mut times).map(row).collect())
    }
}

fn layout(order: Order) -> Layout {
    match order {
        Order::Nchw => Layout::ChannelsFirst,
        Order::Nhwc => Layout::ChannelsLast,
    }
}

/// A layer that is ready, with its source and result.
pub trait Timed {
    /// Fills the result with what is no right value anywhere.
    fn blank(&mut self) -> Result<()>;

    /// Some calls, one after another, and until the last has ended.
    fn run(&mut self, calls: usize) -> Result<()>;

    /// The result's, as multiples of the tolerance.
    fn errors(&self) -> Result<Errors>;

    /// How long the calls last that are timed as one.
    fn enough(&self) -> Duration {
        CALLS
    }
}

/// A layer in one layout with one kernel.
pub struct Contender {
    pub order: Order,
    pub kernel: &'static str,
    pub forced: bool,
    pub cost: Cost,
    pub layer: Box<dyn Timed>,
    /// Those of the worst result so far.
    pub errors: Errors,
}

impl Contender {
    /// Computes the result anew and checks it.
    fn verify(&mut self) -> Result<()> {
        self.layer.blank()?;
        self.layer.run(1)?;
        self.check()
    }

    /// Checks the result as it stands.
    fn check(&mut self) -> Result<()> {
        let errors = self.layer.errors()?;
        if errors.max >= self.errors.max {
            self.errors = errors;
        }
        // Written so that NaN fails.
        if errors.max <= 1.0 {
            return Ok(());
        }
        let (order, kernel) = (self.order.name(), self.kernel);
        Err(format!("{order} with {kernel} is wrong by {:.3} times the tolerance", errors.max))?
    }

    /// Times calls for a while.
    fn turn(&mut self, times: &mut Vec<f64>) -> Result<()> {
        let enough = self.layer.enough();
        // The roof or another contender has had the caches: calls that do not count come first,
        // and say how many to time as one.
        let mut calls = 1;
        while self.seconds(calls)? * (calls as f64) < enough.as_secs_f64() {
            calls *= 2;
        }
        let start = Instant::now();
        while start.elapsed() < TURN {
            times.push(self.seconds(calls)?);
        }
        Ok(())
    }

    /// Seconds per call of some calls.
    fn seconds(&mut self, calls: usize) -> Result<f64> {
        let start = Instant::now();
        self.layer.run(calls)?;
        Ok(start.elapsed().as_secs_f64() / calls as f64)
    }
}

/// A layer of real numbers.
struct Real<T> {
    prepared: Prepared<T>,
    src: Tensor<T>,
    dst: Tensor<T>,
    expected: Rc<ArrayD<f64>>,
    tolerance: f64,
}

impl<T: Value> Timed for Real<T> {
    fn blank(&mut self) -> Result<()> {
        self.dst.blank()
    }

    fn run(&mut self, calls: usize) -> Result<()> {
        for _ in 0..calls {
            self.prepared.forward_into(black_box(&self.src), &mut self.dst)?;
        }
        black_box(&mut self.dst).wait()
    }

    fn errors(&self) -> Result<Errors> {
        Ok(verify::errors(self.expected.view(), self.dst.values()?.view(), |_| self.tolerance))
    }

    fn enough(&self) -> Duration {
        match &self.dst {
            Tensor::Host(_) => CALLS,
            #[cfg(feature = "cuda")]
            Tensor::Cuda(_) => QUEUED_CALLS,
        }
    }
}
