//! What a chain's layer norm sums over the rows of each position, or of each sample.

use crate::cuda::launch::{self, start_training};
use crate::cuda::memory::Buffer;
use crate::cuda::params::{PW_SWEEP_POSITIONS, pw_sweep};
use crate::cuda::plan::Training as Kernel;
use crate::cuda::train::sweep::{Backward, Coefficients, Parts, Sweep, grid};
use crate::error::{Error, Result};
use crate::stages::NormOver;
use crate::tensor::checked_product;
use crate::train::chain::Op;

impl Sweep<'_> {
    /// Positions that share a layer norm's statistics.
    pub(super) fn norm_unit(&self) -> usize {
        let all = |op: &Op| matches!(op, Op::LayerNorm { over: NormOver::All, .. });
        match self.chain.ops.iter().any(all) {
            true => self.extents[1..].iter().product(),
            false => 1,
        }
    }

    /// What a layer norm, the op with this number, knows of the values that reach it: per position, or
    /// per sample, the mean, `1 / std`, and what rounding the mean has left of the result.
    pub(super) fn norm_statistics(
        &self,
        op: usize,
        over: NormOver,
        eps: f32,
    ) -> Result<Option<Buffer>> {
        let (rows, positions) = (self.rows(), self.positions());
        if positions == 0 {
            return Ok(None);
        }
        let (arrays, cut) = (self.arrays(&Coefficients::default())?, self.cut(false)?);
        let mut params = self.params(&arrays, &cut, &Parts::new(), None, None)?;
        params.stage_count = op as u32;
        let what = "the statistics of a layer norm";
        let (samples, unit) = (self.extents[0], self.norm_unit());
        let mut statistics =
            Buffer::new(self.device, what, norm_bytes(Some(over), samples, positions / samples))?;
        if over == NormOver::Channels {
            params.of_norm = statistics.address() as *mut f32;
            self.start_norm(&mut params)?;
            return Ok(Some(statistics));
        }
        let too_large = || Error::TooLarge { what, sizes: self.extents.to_vec() };
        let bytes = launch::moments_bytes(samples as u64, unit as u64).ok_or_else(too_large)?;
        let moments = Buffer::new(self.device, what, bytes as usize)?;
        params.sums = moments.address() as *mut f64;
        self.start_norm(&mut params)?;
        let sizes = (samples as u64, unit as u64);
        let merged = {
            let _bound = self.device.bind()?;
            // SAFETY: the memory is as large as that of so many moments.
            unsafe { launch::merge(self.device, moments.address(), sizes, rows as u64)? }
        };
        let mut pairs = vec![0.0f64; 2 * samples];
        moments.download_from(merged - moments.address(), &mut pairs)?;
        let count = (rows * unit) as f64;
        let of_samples = pairs.chunks_exact(2).flat_map(|pair| {
            let inv = (1.0 / (pair[1] / count + f64::from(eps)).sqrt()) as f32;
            let high = pair[0] as f32;
            [high, inv, -((pair[0] - f64::from(high)) as f32) * inv]
        });
        statistics.upload(&of_samples.collect::<Vec<f32>>())?;
        Ok(Some(statistics))
    }

    /// The means that a layer norm's gradient takes away, per position or per sample: of the gradient
    /// behind gamma, and of that by what it normalises its input to.
    pub(super) fn norm_coefficients(
        &self,
        tensors: &Backward,
        op: usize,
        over: NormOver,
        so_far: &Coefficients,
    ) -> Result<Option<Buffer>> {
        let (rows, positions) = (self.rows(), self.positions());
        if positions == 0 {
            return Ok(None);
        }
        let (arrays, cut) = (self.arrays(so_far)?, self.cut(false)?);
        let mut params = self.params(&arrays, &cut, &Parts::new(), Some(tensors.d), None)?;
        params.first_stage = op as u32;
        let what = "sums of a layer norm";
        let (samples, unit) = (self.extents[0], self.norm_unit());
        let units = positions / unit;
        let mut means = Buffer::new(self.device, what, checked_product(what, &[2, units, 4])?)?;
        if over == NormOver::Channels {
            params.of_norm = means.address() as *mut f32;
            self.start_norm(&mut params)?;
            return Ok(Some(means));
        }
        let sums = Buffer::new(self.device, what, checked_product(what, &[2, positions, 8])?)?;
        params.sums = sums.address() as *mut f64;
        self.start_norm(&mut params)?;
        let by_sample = Buffer::new(self.device, what, 2 * samples * 8)?;
        self.add_up(&sums, unit, 2 * samples, &by_sample, 0)?;
        let mut values = vec![0.0f64; 2 * samples];
        by_sample.download(&mut values)?;
        let count = (rows * unit) as f64;
        let (ones, products) = values.split_at(samples);
        let of_samples = ones.iter().zip(products);
        let of_samples = of_samples.flat_map(|(one, product)| [one, product].map(|x| x / count));
        means.upload(&of_samples.map(|x| x as f32).collect::<Vec<f32>>())?;
        Ok(Some(means))
    }

    fn start_norm(&self, params: &mut pw_sweep) -> Result<()> {
        let positions = self.positions();
        let blocks = grid(positions.div_ceil(PW_SWEEP_POSITIONS as usize), || vec![positions])?;
        // SAFETY: the tensors are those of the call, what is written has room for all positions.
        unsafe { start_training(self.device, Kernel::Norm, blocks, params) }
    }
}

/// Bytes of the statistics of such a layer norm on so many samples, each of so many positions.
pub(in crate::cuda::train) fn norm_bytes(
    over: Option<NormOver>,
    samples: usize,
    positions: usize,
) -> usize {
    let units = match over {
        Some(NormOver::All) if positions > 0 => samples,
        Some(_) => samples.saturating_mul(positions),
        None => 0,
    };
    units.saturating_mul(3 * size_of::<f32>())
}
