//! Adam (Kingma and Ba 2015), as PyTorch's `torch.optim.Adam` computes it.

use std::collections::BTreeMap;

/// The optimiser's settings and what it remembers.
pub struct Adam {
    pub learning_rate: f64,
    /// Keeps the denominator from zero.
    pub eps: f64,
    /// Steps that have begun.
    pub steps: u64,
    /// By the parameter's name.
    pub moments: BTreeMap<String, Moments>,
}

/// Running means of a parameter's gradient, each of its length.
pub struct Moments {
    pub mean: Vec<f32>,
    /// Of the gradient's squares.
    pub square: Vec<f32>,
}

/// The share of the past in the running mean, and in that of squares.
const BETA: (f64, f64) = (0.9, 0.999);

impl Adam {
    /// With PyTorch's default settings.
    pub fn new() -> Adam {
        Adam { learning_rate: 1e-3, eps: 1e-8, steps: 0, moments: BTreeMap::new() }
    }

    /// Begins a step, in which every parameter is updated once.
    pub fn begin_step(&mut self) {
        self.steps += 1;
    }

    /// Moves a parameter against its gradient.
    pub fn update(&mut self, name: &str, values: &mut [f32], gradient: &[f32]) {
        let zeros = || vec![0.0; values.len()];
        let Moments { mean, square } = self
            .moments
            .entry(name.to_owned())
            .or_insert_with(|| Moments { mean: zeros(), square: zeros() });
        // Both began at zero, which is taken out of them again.
        let share = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let rate = (self.learning_rate / share(BETA.0)) as f32;
        let spread = share(BETA.1).sqrt() as f32;
        let (new, new_square) = ((1.0 - BETA.0) as f32, (1.0 - BETA.1) as f32);
        let (old_square, eps) = (BETA.1 as f32, self.eps as f32);
        let moments = mean.iter_mut().zip(square);
        for ((value, d), (mean, square)) in values.iter_mut().zip(gradient).zip(moments) {
            *mean += new * (d - *mean);
            *square = old_square * *square + new_square * d * d;
            *value -= rate * *mean / (square.sqrt() / spread + eps);
        }
    }
}
