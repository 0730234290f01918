//! The table of layers, and what each is to the crate.

use std::fmt;
use std::path::Path;

use csv::{ReaderBuilder, StringRecord, Trim};
use ndarray::Array2;
use pointwise::init::{self, Init};
use pointwise::{Activation, BatchNorm, Element, Pointwise, Quantization, Quantized};

use crate::Result;

/// The activations that a name says all of.
const ACTIVATIONS: [Activation; 11] = [
    Activation::Relu,
    Activation::Relu6,
    Activation::Sigmoid,
    Activation::Tanh,
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::HardSigmoid,
    Activation::HardSwish,
    Activation::Softplus,
    Activation::Mish,
];

const COLUMNS: [&str; 10] =
    ["model", "layer", "n", "cin", "cout", "h", "w", "stride", "groups", "act"];

/// The layers of a file.
pub struct Table {
    /// The file's.
    pub name: String,
    pub layers: Vec<Layer>,
}

/// One line of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Where it stands in the file, from 1.
    pub line: u64,
    pub model: String,
    pub layer: String,
    pub n: usize,
    pub c_in: usize,
    pub c_out: usize,
    pub h: usize,
    pub w: usize,
    pub stride: usize,
    pub groups: usize,
    pub activation: Option<Activation>,
}

impl Layer {
    /// The activation's name.
    pub fn act(&self) -> &'static str {
        self.activation.map_or("none", Activation::name)
    }

    /// Convolution, bias, activation; weights are what a type holds.
    pub fn description<T: Element>(&self) -> Result<Pointwise> {
        let bias = init::bias(self.c_out, self.c_in / self.groups, 2)?;
        Ok(self.activated(self.convolution::<T>()?.bias(bias)))
    }

    /// Convolution, batch norm, activation; weights are what a type holds.
    pub fn trained<T: Element>(&self, beta: Vec<f32>) -> Result<Pointwise> {
        let ones = vec![1.0; self.c_out];
        let norm = BatchNorm::new(vec![0.0; self.c_out], ones.clone()).affine(ones, beta);
        Ok(self.activated(self.convolution::<T>()?.batch_norm(norm)))
    }

    fn convolution<T: Element>(&self) -> Result<Pointwise> {
        let weight = Init::pytorch_default().weight(self.c_out, self.c_in / self.groups, 1)?;
        let rounded = weight.mapv(|x| T::from_f32(x).to_f32());
        Ok(Pointwise::new(rounded).groups(self.groups).stride(self.stride))
    }

    fn activated(&self, description: Pointwise) -> Pointwise {
        match self.activation {
            Some(activation) => description.activation(activation),
            None => description,
        }
    }

    /// Convolution, bias, activation of u8 to u8, for any weights and values of src: results spread over
    /// the bytes, and past both of their ends.
    pub fn quantized(&self, weight: Array2<i8>) -> Result<Quantized> {
        let scale = 0.02 * (weight.ncols() as f32).sqrt();
        let description =
            Quantized::new(weight, vec![0.01; self.c_out], Quantization::u8(0.02, 128))
                .bias(vec![100; self.c_out])
                .dst(Quantization::u8(scale, 100))
                .groups(self.groups)
                .stride(self.stride);
        Ok(match self.activation {
            None => description,
            Some(Activation::Relu) => description.relu(),
            Some(Activation::Relu6) => description.relu6(),
            Some(other) => Err(format!("no {} in 8-bit integers", other.name()))?,
        })
    }
}

/// `resnet50 s1.c1a`.
impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.model, self.layer)
    }
}

impl Table {
    /// `benches/layers.csv`, as it was when this program was built.
    pub fn built_in(batch: Option<usize>) -> Result<Self> {
        Self::parse("benches/layers.csv", include_bytes!("../../benches/layers.csv"), batch)
    }

    /// Every layer of a file, with another batch if one is given.
    pub fn read(path: &Path, batch: Option<usize>) -> Result<Self> {
        let name = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|error| format!("{name}: {error}"))?;
        Self::parse(&name, &bytes, batch)
    }

    fn parse(name: &str, bytes: &[u8], batch: Option<usize>) -> Result<Self> {
        let about = |error: csv::Error| format!("{name}: {error}");
        // Lines of another length are reported below, with what they hold.
        let mut reader = ReaderBuilder::new().trim(Trim::All).flexible(true).from_reader(bytes);
        let header = reader.headers().map_err(about)?.clone();
        let fields: Vec<&str> = header.iter().collect();
        let column = |name: &str| {
            let mut found = (0..fields.len()).filter(|&i| fields[i] == name);
            match (found.next(), found.next()) {
                (Some(column), None) => Ok(column),
                (None, _) => Err(format!("no column {name} among {}", fields.join(","))),
                _ => Err(format!("two columns {name} in {}", fields.join(","))),
            }
        };
        let mut columns = [0; COLUMNS.len()];
        for (place, wanted) in columns.iter_mut().zip(COLUMNS) {
            *place = column(wanted).map_err(|why| format!("{name}:1: {why}"))?;
        }

        let mut layers = Vec::new();
        for record in reader.records() {
            let record = record.map_err(about)?;
            let line = record.position().map_or(0, csv::Position::line);
            let values = || record.iter().collect::<Vec<_>>().join(",");
            let layer = if record.len() == fields.len() {
                layer(line, &record, &columns, batch)
            } else {
                Err(format!("{} fields, but the header has {}", record.len(), fields.len()))
            };
            layers.push(layer.map_err(|why| format!("{name}:{line}: {why}: {}", values()))?);
        }
        if layers.is_empty() {
            Err(format!("{name}: no layers"))?;
        }
        Ok(Table { name: name.to_owned(), layers })
    }
}

fn layer(
    line: u64,
    record: &StringRecord,
    columns: &[usize; COLUMNS.len()],
    batch: Option<usize>,
) -> Result<Layer, String> {
    let [model, name, n, c_in, c_out, h, w, stride, groups, act] =
        columns.map(|column| &record[column]);
    let size = |column: &str, text: &str| match text.parse::<usize>() {
        Ok(size) if size > 0 => Ok(size),
        _ => Err(format!("{column} is {text:?}, expected a positive integer")),
    };
    let n = size("n", n)?;
    let layer = Layer {
        line,
        model: model.to_owned(),
        layer: name.to_owned(),
        n: batch.unwrap_or(n),
        c_in: size("cin", c_in)?,
        c_out: size("cout", c_out)?,
        h: size("h", h)?,
        w: size("w", w)?,
        stride: size("stride", stride)?,
        groups: size("groups", groups)?,
        activation: activation(act)?,
    };
    let Layer { n, c_in, c_out, h, w, groups, .. } = layer;
    for (column, channels) in [("cin", c_in), ("cout", c_out)] {
        if channels % groups != 0 {
            Err(format!("{groups} groups do not divide {column} {channels}"))?;
        }
    }
    // What fits is also addressable in bytes of f64, which the reference needs.
    let fits = |sizes: &[usize]| {
        let product = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        product.is_some_and(|product| product <= isize::MAX as usize / 8)
    };
    if !fits(&[n, c_in, h, w]) || !fits(&[n, c_out, h, w]) || !fits(&[c_in, c_out]) {
        Err("a tensor too large for any memory")?;
    }
    Ok(layer)
}

fn activation(name: &str) -> Result<Option<Activation>, String> {
    if name == "none" {
        return Ok(None);
    }
    ACTIVATIONS.into_iter().find(|a| a.name() == name).map(Some).ok_or_else(|| {
        let known = ACTIVATIONS.map(Activation::name).join(", ");
        format!("act is {name:?}, expected none, {known}")
    })
}
