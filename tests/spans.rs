//! Feature `tracing`: a span per call, with what the call costs.

#[path = "common/trials.rs"]
mod trials;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Failed};
use ndarray::{Array2, Array3};
use pointwise::train::{Accumulate, Params};
use pointwise::{Branches, Device, Pointwise, Prepared, Sequence};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Metadata, Subscriber};
use trials::{cuda, trial};

fn main() -> ExitCode {
    let cpu = || Ok(Device::cpu().threads(1));
    let trials = vec![
        trial("a_call_is_a_span_with_kernel_and_cost", cpu, |device| call(&device)),
        trial("a_call_is_a_span_with_kernel_and_cost_cuda", cuda, |device| call(&device)),
        // The CPU's branches are one pass, the device's run one after another.
        trial("branches_are_spans", cpu, |device| branches(&device, "(())")),
        trial("branches_are_spans_cuda", cuda, |device| branches(&device, "()()")),
        trial("layers_of_a_sequence_are_spans", cpu, |device| sequence(&device)),
        trial("layers_of_a_sequence_are_spans_cuda", cuda, |device| sequence(&device)),
        #[cfg(feature = "cuda")]
        trial("layers_of_a_sequence_on_device_tensors_are_spans", cuda, |device| {
            on_device_tensors(&device)
        }),
        trial("passes_of_training_are_spans", cpu, |device| training(&device)),
        trial("passes_of_training_are_spans_cuda", cuda, |device| training(&device)),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

type Fields = BTreeMap<String, String>;

/// What was told, and what was entered and left.
#[derive(Default)]
struct Watcher {
    watching: AtomicBool,
    spans: Mutex<Vec<Fields>>,
    steps: Mutex<String>,
}

struct Collect<'a>(&'a mut Fields);

impl Visit for Collect<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().into(), format!("{value:?}").trim_matches('"').into());
    }
}

struct Shared(Arc<Watcher>);

impl Subscriber for Shared {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "pointwise" && self.0.watching.load(Ordering::Relaxed)
    }

    fn register_callsite(&self, _: &'static Metadata<'static>) -> tracing::subscriber::Interest {
        tracing::subscriber::Interest::sometimes()
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Fields::from([("level".into(), span.metadata().level().to_string())]);
        span.record(&mut Collect(&mut fields));
        let mut spans = self.0.spans.lock().unwrap();
        spans.push(fields);
        Id::from_u64(spans.len() as u64)
    }

    fn enter(&self, _: &Id) {
        self.0.steps.lock().unwrap().push('(');
    }

    fn exit(&self, _: &Id) {
        self.0.steps.lock().unwrap().push(')');
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
}

/// Watches this thread.
fn watch() -> (Arc<Watcher>, DefaultGuard) {
    let watcher = Arc::new(Watcher::default());
    let guard = tracing::subscriber::set_default(Shared(watcher.clone()));
    watcher.watching.store(true, Ordering::Relaxed);
    (watcher, guard)
}

impl Watcher {
    /// Takes what was told: of layers run on these shapes, entered and left like that.
    fn expect(&self, layers: &[(&Prepared, &[usize])], steps: &str) {
        let told = std::mem::take(&mut *self.spans.lock().unwrap());
        assert_eq!(std::mem::take(&mut *self.steps.lock().unwrap()), steps, "{told:?}");
        assert_eq!(told.len(), layers.len(), "{told:?}");
        for (span, (layer, shape)) in told.iter().zip(layers) {
            let expected = layer.explain(shape).unwrap();
            assert_eq!(span["level"], "DEBUG");
            assert_eq!(span["kernel"], expected.kernel);
            assert_eq!(span["problem"], expected.problem);
            assert_eq!(span["macs"], expected.cost.macs.to_string());
            assert_eq!(span["bytes"], expected.cost.bytes().to_string());
        }
    }
}

fn layer(device: &Device, c_out: usize, c_in: usize) -> Prepared {
    Pointwise::new(Array2::<f32>::ones((c_out, c_in))).relu().prepare(device).unwrap()
}

fn call(device: &Device) -> Result<(), Failed> {
    let (watcher, _guard) = watch();
    watcher.watching.store(false, Ordering::Relaxed);
    let layer = layer(device, 16, 8);
    let src = Array3::<f32>::ones((2, 8, 10));
    layer.forward(&src)?;
    assert!(watcher.spans.lock().unwrap().is_empty(), "nobody watched");

    watcher.watching.store(true, Ordering::Relaxed);
    layer.forward(&src)?;
    assert_eq!(watcher.spans.lock().unwrap()[0]["macs"], (2 * 10 * 16 * 8).to_string());
    watcher.expect(&[(&layer, &[2, 8, 10])], "()");
    Ok(())
}

fn branches(device: &Device, steps: &str) -> Result<(), Failed> {
    let (watcher, _guard) = watch();
    let (a, b) = (layer(device, 16, 8), layer(device, 4, 8));
    let src = Array3::<f32>::ones((2, 8, 10));
    Branches::new(vec![a.clone(), b.clone()])?.forward(&src)?;
    watcher.expect(&[(&a, &[2, 8, 10]), (&b, &[2, 8, 10])], steps);
    Ok(())
}

/// The second convolves some of the channels and lets the others pass.
fn chain(device: &Device) -> Result<[Prepared; 3], Failed> {
    let partial = Pointwise::new(Array2::<f32>::ones((5, 5))).partial(2..7).prepare(device)?;
    Ok([layer(device, 16, 8), partial, layer(device, 4, 16)])
}

fn sequence(device: &Device) -> Result<(), Failed> {
    let (watcher, _guard) = watch();
    let [a, b, c] = &chain(device)?;
    let sequence = Sequence::new(vec![a.clone(), b.clone(), c.clone()])?;
    sequence.forward(&Array3::<f32>::ones((2, 8, 10)))?;
    watcher.expect(&[(a, &[2, 8, 10]), (b, &[2, 16, 10]), (c, &[2, 16, 10])], "()()()");
    Ok(())
}

#[cfg(feature = "cuda")]
fn on_device_tensors(device: &Device) -> Result<(), Failed> {
    let cuda = pointwise::CudaDevice::open(0)?;
    let (watcher, _guard) = watch();
    let [a, b, c] = &chain(device)?;
    let sequence = Sequence::new(vec![a.clone(), b.clone(), c.clone()])?;
    let src = pointwise::CudaTensor::from_host(&cuda, Array3::<f32>::ones((2, 8, 10)).view())?;
    sequence.forward(&src)?;
    watcher.expect(&[(a, &[2, 8, 10]), (b, &[2, 16, 10]), (c, &[2, 16, 10])], "()()()");
    Ok(())
}

fn training(device: &Device) -> Result<(), Failed> {
    let (watcher, _guard) = watch();
    let weight = Array2::<f32>::ones((16, 8));
    let mut params = Params::new(&Pointwise::new(weight).relu(), device)?;
    let (mut grads, src) = (params.grads(), Array3::<f32>::ones((2, 8, 10)));
    let layer = params.prepare()?;
    let explained = layer.explain(src.shape())?;
    let kept = params.workspace_bytes(src.shape())?;
    assert!(kept > 0);
    let (dst, workspace) = params.forward(&src)?;
    let read = workspace.bytes();
    params.backward(&src, workspace, &dst, &mut grads, Accumulate::Set)?;

    let told = watcher.spans.lock().unwrap().clone();
    let macs = 2 * 10 * 16 * 8;
    // By the weight and by src; both are written, and what the forward pass kept is read.
    let beside = 4 * (src.len() + 16 * 8) + read;
    let passes = [("forward", macs, kept), ("backward", 2 * macs, beside)];
    assert_eq!(told.len(), passes.len(), "{told:?}");
    for (span, (pass, macs, beside)) in told.iter().zip(passes) {
        assert_eq!(span["kernel"], pass);
        assert_eq!(span["problem"], explained.problem);
        assert_eq!(span["macs"], macs.to_string());
        assert_eq!(span["bytes"], (explained.cost.bytes() + beside).to_string(), "{pass}");
    }
    assert_eq!(*watcher.steps.lock().unwrap(), "()()");
    Ok(())
}
