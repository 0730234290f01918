//! A layer as the driver sends it, and its inputs.

use std::path::Path;

use crate::Result;

#[derive(Clone, Copy, Debug)]
pub struct Layer {
    pub n: usize,
    pub c_in: usize,
    pub c_out: usize,
    pub h: usize,
    pub w: usize,
    pub stride: usize,
    pub groups: usize,
    pub relu: bool,
}

impl Layer {
    /// `n c_in c_out h w stride groups act DIR`; gives the rest, the directory of the inputs.
    pub fn parse(line: &str) -> Result<(Layer, &str)> {
        let fields: Vec<&str> = line.splitn(9, ' ').collect();
        let &[n, c_in, c_out, h, w, stride, groups, act, dir] = fields.as_slice() else {
            return Err(format!("not a layer: {line}").into());
        };
        let relu = match act {
            "relu" => true,
            "none" => false,
            _ => return Err(format!("act is {act}, expected relu or none").into()),
        };
        let layer = Layer {
            n: n.parse()?,
            c_in: c_in.parse()?,
            c_out: c_out.parse()?,
            h: h.parse()?,
            w: w.parse()?,
            stride: stride.parse()?,
            groups: groups.parse()?,
            relu,
        };
        Ok((layer, dir))
    }

    /// Height and width of dst.
    pub fn out(&self) -> (usize, usize) {
        (self.h.div_ceil(self.stride), self.w.div_ceil(self.stride))
    }

    pub fn src_len(&self) -> usize {
        self.n * self.c_in * self.h * self.w
    }

    pub fn dst_len(&self) -> usize {
        let (h, w) = self.out();
        self.n * self.c_out * h * w
    }
}

/// What all contenders read: the same values in the order of each layout.
pub struct Inputs {
    /// `[n, c_in, h, w]`.
    pub nchw: Buffer,
    /// `[n, h, w, c_in]`.
    pub nhwc: Buffer,
    /// `[c_out, c_in / groups]`.
    pub weight: Vec<f32>,
    /// `[c_out]`.
    pub bias: Vec<f32>,
    /// Where every buffer starts: see [`Buffer`].
    pub offset: usize,
    /// `f32`, `bf16` or `int8`.
    pub dtype: String,
    /// Of int8: scale and zero point of src, of dst, then a scale per output channel.
    pub quantization: Vec<f32>,
}

impl Inputs {
    pub fn read(layer: &Layer, dir: &Path, offset: usize, dtype: &str) -> Result<Inputs> {
        let values = |name: &str, len: usize| -> Result<Vec<f32>> {
            let path = dir.join(name);
            let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            if bytes.len() != 4 * len {
                let path = path.display();
                return Err(
                    format!("{path} has {} bytes, expected {}", bytes.len(), 4 * len).into()
                );
            }
            Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let buffer = |name| -> Result<Buffer> {
            let mut buffer = Buffer::new(layer.src_len(), offset, f32::NAN);
            buffer.get_mut().copy_from_slice(&values(name, layer.src_len())?);
            Ok(buffer)
        };
        Ok(Inputs {
            nchw: buffer("src_nchw.f32")?,
            nhwc: buffer("src_nhwc.f32")?,
            weight: values("weight.f32", layer.c_out * layer.c_in / layer.groups)?,
            bias: values("bias.f32", layer.c_out)?,
            offset,
            dtype: dtype.to_owned(),
            quantization: match dtype {
                "int8" => values("quantization.f32", 4 + layer.c_out)?,
                _ => Vec::new(),
            },
        })
    }
}

/// Values that start `offset` bytes past a boundary of 64, so that no contender owes its speed to
/// where malloc put its arrays.
pub struct Buffer<T = f32> {
    values: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy> Buffer<T> {
    /// `blank`, until somebody writes to it.
    pub fn new(len: usize, offset: usize, blank: T) -> Self {
        let values = vec![blank; len + 128];
        let start = values.as_ptr().align_offset(64) + offset / size_of::<T>();
        Buffer { values, start, len }
    }

    /// Of other values.
    pub fn of(values: &Buffer, offset: usize, f: impl Fn(f32) -> T) -> Self {
        let mut buffer = Buffer::new(values.len, offset, f(0.0));
        buffer.get_mut().iter_mut().zip(values.get()).for_each(|(x, &y)| *x = f(y));
        buffer
    }

    pub fn get(&self) -> &[T] {
        &self.values[self.start..][..self.len]
    }

    pub fn get_mut(&mut self) -> &mut [T] {
        &mut self.values[self.start..][..self.len]
    }
}
