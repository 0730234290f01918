//! From a file to what the network reads, as TensorFlow's EfficientNet evaluates: a centre crop,
//! then a bicubic resize.

use std::error::Error;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use image::imageops::{FilterType, crop_imm, resize};
use image::{DynamicImage, ImageDecoder, ImageReader, Limits};
use pointwise::Layout;

use super::network::SIZE;

/// The side of the centre that is kept, relative to the shorter side of the picture: 224 / 256.
const KEPT: (u32, u32) = (224, 256);

/// Reads a PNG or JPEG file and gives the pixels `[SIZE, SIZE, 3]` of its centre.
pub fn read(path: &Path) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
    let file = BufReader::new(File::open(path)?);
    let mut decoder = ImageReader::new(file).with_guessed_format()?.into_decoder()?;
    Limits::default().reserve(decoder.total_bytes())?;
    let orientation = decoder.orientation()?;
    let mut picture = DynamicImage::from_decoder(decoder)?;
    picture.apply_orientation(orientation);
    let picture = picture.to_rgb8();
    let (width, height) = picture.dimensions();
    let side = width.min(height);
    let side = (u64::from(side) * u64::from(KEPT.0) / u64::from(KEPT.1)).max(1) as u32;
    let (left, top) = ((width - side).div_ceil(2), (height - side).div_ceil(2));
    let centre = crop_imm(&picture, left, top, side, side).to_image();
    Ok(resize(&centre, SIZE as u32, SIZE as u32, FilterType::CatmullRom).into_raw())
}

/// `(x - 127) / 128` of pixels `[SIZE, SIZE, 3]`, as `[3, SIZE, SIZE]` or channels last.
pub fn normalise(pixels: &[u8], layout: Layout) -> Vec<f32> {
    let value = |&x: &u8| (f32::from(x) - 127.0) / 128.0;
    match layout {
        Layout::ChannelsLast => pixels.iter().map(value).collect(),
        Layout::ChannelsFirst => {
            (0..3).flat_map(|c| pixels.iter().skip(c).step_by(3).map(value)).collect()
        }
    }
}

/// Labels and probabilities of the `n` likeliest classes, the likeliest first.
pub fn top<'a>(logits: &[f32], labels: &'a [String], n: usize) -> Vec<(&'a str, f32)> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f32> = logits.iter().map(|x| (x - largest).exp()).collect();
    let sum: f32 = exps.iter().sum();
    let mut classes: Vec<_> =
        labels.iter().zip(exps).map(|(label, exp)| (label.as_str(), exp / sum)).collect();
    classes.sort_by(|a, b| b.1.total_cmp(&a.1));
    classes.truncate(n);
    classes
}
