//! Softmax cross-entropy, and what a network answered.

use ndarray::{Array2, ArrayView1};

/// The mean over a batch of `-ln softmax(logits)[label]`.
pub struct CrossEntropy {
    pub loss: f64,
    /// `[n, classes]`: the gradient by the logits.
    pub d_logits: Array2<f32>,
    /// How many labels have the largest logit.
    pub right: usize,
}

impl CrossEntropy {
    /// Of `logits [n, classes]`, n at least 1.
    pub fn of(logits: &Array2<f32>, labels: &[usize]) -> CrossEntropy {
        let n = labels.len() as f64;
        let (mut loss, mut d_logits) = (0.0, Array2::zeros(logits.dim()));
        let rows = logits.outer_iter().zip(d_logits.outer_iter_mut());
        for ((row, mut d_row), &label) in rows.zip(labels) {
            // Less the largest, so that no exponential overflows.
            let largest = f64::from(row[answer(row)]);
            let exps = row.mapv(|x| (f64::from(x) - largest).exp());
            let sum = exps.sum();
            loss += sum.ln() + largest - f64::from(row[label]);
            for (class, (d, exp)) in d_row.iter_mut().zip(exps).enumerate() {
                let wanted = if class == label { 1.0 } else { 0.0 };
                *d = ((exp / sum - wanted) / n) as f32;
            }
        }
        CrossEntropy { loss: loss / n, d_logits, right: right(logits, labels) }
    }
}

/// How many labels have the largest of their logits `[n, classes]`.
pub fn right(logits: &Array2<f32>, labels: &[usize]) -> usize {
    logits.outer_iter().zip(labels).filter(|(row, label)| answer(row.view()) == **label).count()
}

/// The class of the largest logit, the first of equal ones.
fn answer(logits: ArrayView1<'_, f32>) -> usize {
    (0..logits.len()).fold(0, |best, class| if logits[class] > logits[best] { class } else { best })
}
