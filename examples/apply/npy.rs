//! Arrays of f32, u8 and i8 in NumPy's file format. A reader of our own, so that errors name shapes and sizes: it
//! believes no header before the file's size bears it out, and allocates no more than the file holds.
//! <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use ndarray::{ArrayD, IxDyn, ShapeBuilder};

use crate::Result;

const MAGIC: &[u8] = b"\x93NUMPY";
/// NumPy's own limit is 10,000 bytes.
const MAX_HEADER: u32 = 1 << 16;

/// An element of an array.
pub trait Value: Copy + Default {
    /// Its name.
    const NAME: &str;
    /// How NumPy calls it, with the byte order of [`bytes`](Self::bytes).
    const DTYPE: &str;
    /// The value of as many bytes as it takes, in the order that a dtype names.
    fn decoder(dtype: &str) -> Option<fn(&[u8]) -> Self>;
    fn bytes(&self) -> impl AsRef<[u8]>;
}

impl Value for f32 {
    const NAME: &str = "f32";
    const DTYPE: &str = "<f4";

    fn decoder(dtype: &str) -> Option<fn(&[u8]) -> f32> {
        match dtype {
            "<f4" => Some(|bytes| f32::from_le_bytes(bytes.try_into().unwrap_or_default())),
            ">f4" => Some(|bytes| f32::from_be_bytes(bytes.try_into().unwrap_or_default())),
            _ => None,
        }
    }

    fn bytes(&self) -> impl AsRef<[u8]> {
        self.to_le_bytes()
    }
}

impl Value for u8 {
    const NAME: &str = "u8";
    const DTYPE: &str = "|u1";

    fn decoder(dtype: &str) -> Option<fn(&[u8]) -> u8> {
        dtype.ends_with("u1").then_some(|bytes| bytes[0])
    }

    fn bytes(&self) -> impl AsRef<[u8]> {
        [*self]
    }
}

impl Value for i8 {
    const NAME: &str = "i8";
    const DTYPE: &str = "|i1";

    fn decoder(dtype: &str) -> Option<fn(&[u8]) -> i8> {
        dtype.ends_with("i1").then_some(|bytes| bytes[0] as i8)
    }

    fn bytes(&self) -> impl AsRef<[u8]> {
        self.to_le_bytes()
    }
}

/// An array of either 8-bit type.
pub enum Integers {
    U8(ArrayD<u8>),
    I8(ArrayD<i8>),
}

/// Reads an f32 array of rank 2 to 5.
pub fn read(path: &Path) -> Result<ArrayD<f32>> {
    open(path, |mut file| {
        let header = header(&mut file)?;
        body(file, header)
    })
}

/// Reads an array of 8-bit integers of rank 2 to 5.
pub fn integers(path: &Path) -> Result<Integers> {
    open(path, |mut file| {
        let header = header(&mut file)?;
        Ok(match header.dtype.trim_start_matches(['|', '<', '>', '=']) {
            "u1" => Integers::U8(body(file, header)?),
            "i1" => Integers::I8(body(file, header)?),
            _ => Err(format!("dtype {}, expected |u1 (u8) or |i1 (i8)", header.dtype))?,
        })
    })
}

fn open<T>(path: &Path, parse: impl FnOnce(File) -> Result<T>) -> Result<T> {
    let array = File::open(path).map_err(|error| error.to_string().into()).and_then(parse);
    Ok(array.map_err(|error| format!("{}: {error}", path.display()))?)
}

fn header(mut file: impl Read) -> Result<Header> {
    let mut bytes = [0; 8];
    exactly(&mut file, &mut bytes)?;
    if !bytes.starts_with(MAGIC) {
        Err("not an npy file")?;
    }
    let header = match bytes[6] {
        1 => {
            let mut len = [0; 2];
            exactly(&mut file, &mut len)?;
            u32::from(u16::from_le_bytes(len))
        }
        2 | 3 => {
            let mut len = [0; 4];
            exactly(&mut file, &mut len)?;
            u32::from_le_bytes(len)
        }
        version => Err(format!("npy format version {version}, expected 1, 2 or 3"))?,
    };
    if header > MAX_HEADER {
        Err(format!("an npy header of {header} bytes, at most {MAX_HEADER} are accepted"))?;
    }
    let mut bytes = vec![0; header as usize];
    exactly(&mut file, &mut bytes)?;
    let header = std::str::from_utf8(&bytes).map_err(|_| "the npy header is not text")?;
    Ok(Header::parse(header).ok_or_else(|| {
        let start: String = header.trim().chars().take(120).collect();
        format!("the npy header does not describe a plain array: {start}")
    })?)
}

fn body<T: Value>(file: impl Read, header: Header) -> Result<ArrayD<T>> {
    let Header { dtype, fortran, shape } = header;
    let decode = T::decoder(&dtype)
        .ok_or_else(|| format!("dtype {dtype}, expected {} ({})", T::DTYPE, T::NAME))?;
    if !(2..=5).contains(&shape.len()) {
        Err(format!("shape {shape:?} has rank {}, expected 2 to 5", shape.len()))?;
    }
    let expected = byte_count::<T>(&shape).ok_or_else(|| format!("shape {shape:?} overflows"))?;
    let mut bytes = Vec::new();
    file.take(expected + 1).read_to_end(&mut bytes)?;
    let got = bytes.len() as u64;
    if got != expected {
        let got = if got > expected { "more".into() } else { got.to_string() };
        let name = T::NAME;
        Err(format!("shape {shape:?} of {name} takes {expected} bytes, the file holds {got}"))?;
    }
    let values = bytes.chunks_exact(size_of::<T>()).map(decode).collect();
    Ok(ArrayD::from_shape_vec(IxDyn(&shape).set_f(fortran), values)?)
}

fn exactly(file: &mut impl Read, bytes: &mut [u8]) -> Result<()> {
    file.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => "the npy header is truncated".into(),
        _ => error.into(),
    })
}

/// Bytes of an array; `None` if they, or its axes that are not empty, overflow.
fn byte_count<T>(shape: &[usize]) -> Option<u64> {
    let mut nonzero = shape.iter().filter(|&&len| len > 0);
    let count = nonzero.try_fold(size_of::<T>(), |product, &len| product.checked_mul(len))?;
    let count = u64::try_from(isize::try_from(count).ok()?).ok()?;
    Some(if shape.contains(&0) { 0 } else { count })
}

/// What an npy header says: a dict literal of Python.
struct Header {
    dtype: String,
    fortran: bool,
    shape: Vec<usize>,
}

impl Header {
    fn parse(text: &str) -> Option<Header> {
        let (mut dtype, mut fortran, mut shape) = (None, None, None);
        let mut rest = text.trim().strip_prefix('{')?.strip_suffix('}')?.trim();
        while !rest.is_empty() {
            let (key, after) = quoted(rest)?;
            let value = after.trim_start().strip_prefix(':')?.trim_start();
            match key {
                "descr" => {
                    let (text, after) = quoted(value)?;
                    (dtype, rest) = (Some(text.to_owned()), after);
                }
                "fortran_order" => {
                    let truth = |word, truth| value.strip_prefix(word).map(|rest| (truth, rest));
                    let (truth, after) = truth("True", true).or_else(|| truth("False", false))?;
                    (fortran, rest) = (Some(truth), after);
                }
                "shape" => {
                    let (axes, after) = value.strip_prefix('(')?.split_once(')')?;
                    let axes = axes.strip_suffix(',').unwrap_or(axes);
                    let axes = axes.split(',').filter(|_| !axes.trim().is_empty());
                    let axes = axes.map(|len| len.trim().trim_end_matches('L').parse().ok());
                    (shape, rest) = (Some(axes.collect::<Option<_>>()?), after);
                }
                _ => return None,
            }
            rest = rest.trim_start();
            match rest.strip_prefix(',') {
                Some(after) => rest = after.trim_start(),
                None if rest.is_empty() => {}
                None => return None,
            }
        }
        Some(Header { dtype: dtype?, fortran: fortran?, shape: shape? })
    }
}

/// The text in quotes at the start, and what follows it.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    text[1..].split_once(quote)
}

/// A row-major array of zeros, or an error where an allocation would abort.
pub fn zeros<T: Copy + Default>(shape: &[usize]) -> Result<ArrayD<T>> {
    let bytes = byte_count::<T>(shape).ok_or_else(|| format!("shape {shape:?} overflows"))?;
    let count = bytes / size_of::<T>() as u64;
    let mut values = Vec::new();
    values
        .try_reserve_exact(count as usize)
        .map_err(|_| format!("no memory for a result of shape {shape:?}"))?;
    values.resize(count as usize, T::default());
    Ok(ArrayD::from_shape_vec(IxDyn(shape), values)?)
}

/// Writes a row-major array. The file appears complete or not at all.
pub fn write<T: Value>(path: &Path, array: &ArrayD<T>) -> Result<()> {
    let written = match fs::canonicalize(path) {
        // A device or a pipe is not to be replaced by a file.
        Ok(target) if !target.is_file() => File::create(&target).and_then(|f| put(f, array)),
        Ok(target) => replace(&target, array),
        Err(_) => replace(path, array),
    };
    Ok(written.map_err(|error| format!("{}: {error}", path.display()))?)
}

fn replace<T: Value>(path: &Path, array: &ArrayD<T>) -> io::Result<()> {
    path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
    let temporary = path.with_file_name(format!(".apply-{}.tmp", std::process::id()));
    let written = File::create_new(&temporary)
        .and_then(|file| put(file, array))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // What went wrong before is the better message.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn put<T: Value>(file: File, array: &ArrayD<T>) -> io::Result<()> {
    let axes: Vec<_> = array.shape().iter().map(usize::to_string).collect();
    let axes = axes.join(", ");
    let dtype = T::DTYPE;
    let mut header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({axes}), }}");
    // The data start at a multiple of 64, after ten bytes, the header and its newline.
    header.extend(std::iter::repeat_n(' ', 63 - (10 + header.len()) % 64));
    header.push('\n');
    let mut file = BufWriter::with_capacity(1 << 16, file);
    file.write_all(MAGIC)?;
    file.write_all(&[1, 0])?;
    file.write_all(&(header.len() as u16).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for value in array {
        file.write_all(value.bytes().as_ref())?;
    }
    file.flush()
}
