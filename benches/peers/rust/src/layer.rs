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
}

impl Inputs {
    pub fn read(layer: &Layer, dir: &Path, offset: usize) -> Result<Inputs> {
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
            let mut buffer = Buffer::new(layer.src_len(), offset);
            buffer.get_mut().copy_from_slice(&values(name, layer.src_len())?);
            Ok(buffer)
        };
        Ok(Inputs {
            nchw: buffer("src_nchw.f32")?,
            nhwc: buffer("src_nhwc.f32")?,
            weight: values("weight.f32", layer.c_out * layer.c_in / layer.groups)?,
            bias: values("bias.f32", layer.c_out)?,
            offset,
        })
    }
}

/// Values that start `offset` bytes past a boundary of 64, so that no contender owes its speed to
/// where malloc put its arrays.
pub struct Buffer {
    values: Vec<f32>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// NaN, until somebody writes to it.
    pub fn new(len: usize, offset: usize) -> Buffer {
        let values = vec![f32::NAN; len + 32];
        let start = values.as_ptr().align_offset(64) + offset / 4;
        Buffer { values, start, len }
    }

    pub fn get(&self) -> &[f32] {
        &self.values[self.start..][..self.len]
    }

    pub fn get_mut(&mut self) -> &mut [f32] {
        &mut self.values[self.start..][..self.len]
    }
}
