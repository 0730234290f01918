//! What a run leaves behind: the network for others to load, and all that it takes to go on.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use pointwise::safetensors::tensor::TensorView;
use pointwise::safetensors::{self, Dtype, SafeTensors};
use pointwise::{Device, checkpoint};

use crate::Result;
use crate::adam::{Adam, Moments};
use crate::network::Network;
use crate::training::{Epoch, Training};

/// Writes the network under the names of PyTorch's state dict.
pub fn save_network(path: &Path, network: &Network) -> Result<()> {
    let mut tensors = Tensors::default();
    tensors.network("", network);
    tensors.write(path)
}

/// Writes all that [`resume`] needs.
pub fn save(path: &Path, training: &Training) -> Result<()> {
    let Training { network, adam, seed, history } = training;
    let mut tensors = Tensors::default();
    tensors.network("network/", network);
    for (name, Moments { mean, square }) in &adam.moments {
        tensors.floats(format!("adam/mean/{name}"), &[mean.len()], mean);
        tensors.floats(format!("adam/square/{name}"), &[square.len()], square);
    }
    tensors.count("adam/steps".into(), adam.steps);
    tensors.count("seed".into(), *seed);
    let rows: Vec<_> = history.iter().flat_map(|e| [e.loss, e.training, e.test]).collect();
    tensors.floats("history".into(), &[history.len(), 3], &rows);
    tensors.write(path)
}

/// The training that [`save`] wrote, as it was.
pub fn resume(path: &Path, device: &Device) -> Result<Training> {
    let training = fs::read(path).map_err(Into::into).and_then(|bytes| parse(&bytes, device));
    Ok(training.map_err(|error| format!("{}: {error}", path.display()))?)
}

fn parse(bytes: &[u8], device: &Device) -> Result<Training> {
    let file = SafeTensors::deserialize(bytes)?;
    let network = Network::read(&file, "network/", device)?;
    let mut adam = Adam { steps: count(&file, "adam/steps")?, ..Adam::new() };
    for (name, len) in network.trainable() {
        let moment = |kind: &str| -> Result<Vec<f32>> {
            let name = format!("adam/{kind}/{name}");
            let values = checkpoint::vector(&file, &name)?.to_vec();
            if values.len() != len {
                Err(format!("{name} has {} values, the network has {len}", values.len()))?;
            }
            Ok(values)
        };
        let moments = Moments { mean: moment("mean")?, square: moment("square")? };
        adam.moments.insert(name, moments);
    }
    let history = checkpoint::matrix(&file, "history")?;
    if history.ncols() != 3 {
        Err(format!("history has {} columns, expected 3", history.ncols()))?;
    }
    let epoch =
        |row: ndarray::ArrayView1<'_, f32>| Epoch { loss: row[0], training: row[1], test: row[2] };
    let history = history.outer_iter().map(epoch).collect();
    Ok(Training { network, adam, seed: count(&file, "seed")?, history })
}

/// A counter: an I64 without axes, as PyTorch writes them.
pub fn count(file: &SafeTensors<'_>, name: &str) -> Result<u64> {
    let tensor = file.tensor(name).map_err(pointwise::Error::from)?;
    match (tensor.dtype(), tensor.data().try_into()) {
        (Dtype::I64, Ok(bytes)) => Ok(u64::from_le_bytes(bytes)),
        (dtype, _) => Err(format!("{name} is {dtype} {:?}, expected I64 []", tensor.shape()))?,
    }
}

/// Tensors by name.
#[derive(Default)]
struct Tensors(BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    fn floats(&mut self, name: String, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.0.insert(name, (Dtype::F32, shape.to_vec(), bytes));
    }

    fn count(&mut self, name: String, value: u64) {
        self.0.insert(name, (Dtype::I64, vec![], value.to_le_bytes().to_vec()));
    }

    fn network(&mut self, prefix: &str, network: &Network) {
        network.visit(|name, shape, values| self.floats(format!("{prefix}{name}"), shape, values));
        for (name, batches) in network.batches_tracked() {
            self.count(format!("{prefix}{name}"), batches);
        }
    }

    /// The file appears complete or not at all.
    fn write(&self, path: &Path) -> Result<()> {
        let mut views = Vec::new();
        for (name, (dtype, shape, bytes)) in &self.0 {
            views.push((name, TensorView::new(*dtype, shape.clone(), bytes)?));
        }
        let bytes = safetensors::serialize(views, None)?;
        let temporary = path.with_extension("tmp");
        let written = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
        Ok(written.map_err(|error| format!("{}: {error}", path.display()))?)
    }
}
