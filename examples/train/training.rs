//! The training itself: `reference.py` has the same in PyTorch.

use pointwise::Device;
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::Result;
use crate::adam::Adam;
use crate::data::{Digits, IDENTITY};
use crate::loss::right;
use crate::network::{CHANNELS, Network};

/// Clouds of one step.
pub const BATCH: usize = 32;
/// Of Adam, at first.
const LEARNING_RATE: f64 = 3e-3;
/// The learning rate is halved every so many epochs.
const HALVING: usize = 8;
/// Training clouds are distorted: by up to so much in each element of a linear map, then moved by up
/// to so much along each axis. A pixel is 2/7 wide.
const DISTORTION: f32 = 0.15;
const SHIFT: f32 = 0.2;

/// A training between two epochs.
pub struct Training {
    pub network: Network,
    pub adam: Adam,
    /// Of the initial weights, and of the order and the maps of the training digits.
    pub seed: u64,
    pub history: Vec<Epoch>,
}

/// How an epoch went.
#[derive(Clone, Copy)]
pub struct Epoch {
    /// Mean of the steps' losses.
    pub loss: f32,
    /// In percent, as the steps found it.
    pub training: f32,
    /// In percent, after the epoch.
    pub test: f32,
}

impl Training {
    /// A network that has learnt nothing.
    pub fn new(seed: u64, device: &Device) -> Result<Training> {
        let network = Network::new(CHANNELS, seed, device)?;
        Ok(Training { network, adam: Adam::new(), seed, history: Vec::new() })
    }

    /// Trains on every digit once, but for those beyond the last full batch; calls `after_step`
    /// after each batch.
    pub fn epoch(&mut self, digits: &Digits, mut after_step: impl FnMut()) -> Result<Epoch> {
        let epoch = self.history.len();
        let mut random = random(self.seed, epoch);
        let mut order = digits.training();
        order.shuffle(&mut random);
        self.adam.learning_rate = LEARNING_RATE * 0.5f64.powi((epoch / HALVING) as i32);

        // Of fewer digits than a batch has, all are one.
        let batches = order.chunks_exact(BATCH.min(order.len()));
        let steps = batches.len();
        let (mut loss, mut right) = (0.0, 0);
        for batch in batches {
            let map = || {
                let by = [DISTORTION, DISTORTION, SHIFT];
                IDENTITY
                    .map(|row| std::array::from_fn(|i| row[i] + random.random_range(-by[i]..by[i])))
            };
            let outcome = self.network.step(&digits.batch(batch, map), &mut self.adam)?;
            if !outcome.loss.is_finite() {
                let step = self.adam.steps;
                Err(format!("the loss became {} in step {step}", outcome.loss))?;
            }
            loss += outcome.loss;
            right += outcome.right;
            after_step();
        }
        let epoch = Epoch {
            loss: (loss / steps as f64) as f32,
            training: percent(right, steps * BATCH.min(order.len())),
            test: self.test(digits)?,
        };
        self.history.push(epoch);
        Ok(epoch)
    }

    /// Steps of an epoch.
    pub fn steps(digits: &Digits) -> usize {
        let n = digits.training().len();
        n / BATCH.min(n)
    }

    /// The network's accuracy on the held-out digits, in percent.
    pub fn test(&self, digits: &Digits) -> Result<f32> {
        let batch = digits.batch(&digits.test(), || IDENTITY);
        let logits = self.network.prepare()?.forward(&batch)?;
        Ok(percent(right(&logits, &batch.labels), batch.labels.len()))
    }
}

fn percent(part: usize, whole: usize) -> f32 {
    100.0 * part as f32 / whole as f32
}

/// A generator for each epoch, so that a resumed training draws what an uninterrupted one does.
fn random(seed: u64, epoch: usize) -> ChaCha8Rng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&(epoch as u64).to_le_bytes());
    ChaCha8Rng::from_seed(bytes)
}
