//! The container that nvcc makes: finding the PTX that a device would take.

use std::cmp::Reverse;
use std::io::Read;

/// One entry of the container.
struct Entry<'a> {
    kind: u16,
    arch: u32,
    packing: Option<Packing>,
    payload: &'a [u8],
    /// Bytes of what is packed, once it is unpacked.
    unpacked: usize,
}

/// How a payload is compressed: nvcc 13's default, and what came before it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Packing {
    Zstd,
    Lz4,
}

impl Entry<'_> {
    /// The payload's text, up to a terminating zero.
    fn text(&self) -> Result<String, ImageError> {
        let broken = |text: String| ImageError { code: 200, text };
        let limit = self.unpacked as u64;
        let unpacked;
        let bytes = match self.packing {
            None => self.payload,
            Some(Packing::Zstd) => {
                let mut bytes = Vec::new();
                ruzstd::decoding::StreamingDecoder::new(self.payload)
                    .map_err(|e| e.to_string())
                    .and_then(|from| {
                        // One byte more would be one too many.
                        from.take(limit + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())
                    })
                    .map_err(|e| broken(format!("the fatbin's zstd is broken: {e}")))?;
                unpacked = bytes;
                &unpacked
            }
            Some(Packing::Lz4) => {
                unpacked = lz4_flex::block::decompress(self.payload, self.unpacked)
                    .map_err(|e| broken(format!("the fatbin's LZ4 is broken: {e}")))?;
                &unpacked
            }
        };
        if self.packing.is_some() && bytes.len() != self.unpacked {
            return error(
                200,
                format!("the fatbin holds {} bytes where it says {limit}", bytes.len()),
            );
        }
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }
}

/// Why no PTX was found, as a driver would report it.
#[derive(Debug)]
pub struct ImageError {
    /// CUDA error code.
    pub code: u32,
    /// What is wrong.
    pub text: String,
}

fn error<T>(code: u32, text: impl Into<String>) -> Result<T, ImageError> {
    Err(ImageError { code, text: text.into() })
}

const MAGIC: u32 = 0xba55_ed50;
const WRAPPER: u32 = 0x4662_43b1;
const ELF: u32 = 0x464c_457f;
const KIND_PTX: u16 = 1;
const LZ4: u64 = 0x2000;
const ZSTD: u64 = 0x8000;

/// Copies a module image out of the program's memory.
///
/// # Safety
///
/// `image` must point to what `cuModuleLoadData` takes: a fatbin, a cubin or PTX text with a
/// terminating zero.
pub unsafe fn copy(image: *const u8) -> Result<Vec<u8>, ImageError> {
    // SAFETY: the caller says that this is an image, all of which are at least four bytes long
    // (the shortest PTX text is longer), and images need not be aligned.
    let word = |at: usize| unsafe { image.add(at).cast::<u32>().read_unaligned() };
    match word(0) {
        MAGIC => {
            // SAFETY: a fatbin's header says how many bytes follow it.
            let (header, size) = unsafe {
                (
                    image.add(6).cast::<u16>().read_unaligned(),
                    image.add(8).cast::<u64>().read_unaligned(),
                )
            };
            let len = usize::from(header) + size as usize;
            // SAFETY: as above.
            Ok(unsafe { std::slice::from_raw_parts(image, len) }.to_vec())
        }
        WRAPPER => {
            // SAFETY: the wrapper holds a pointer to the fatbin at byte 8.
            let inner = unsafe { image.add(8).cast::<*const u8>().read_unaligned() };
            // SAFETY: as above.
            unsafe { copy(inner) }
        }
        ELF => error(209, "the image is a cubin (SASS); only PTX can be interpreted"),
        _ => {
            // SAFETY: anything else is text that ends with a zero.
            let text = unsafe { std::ffi::CStr::from_ptr(image.cast()) };
            Ok(text.to_bytes().to_vec())
        }
    }
}

fn entries(image: &[u8]) -> Result<Vec<Entry<'_>>, ImageError> {
    let field = |at: usize, len: usize| -> Option<u64> {
        let bytes = image.get(at..at + len)?;
        Some(bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
    };
    let truncated = || ImageError { code: 200, text: String::from("the fatbin is truncated") };
    let mut at = field(6, 2).ok_or_else(truncated)? as usize;
    let mut out = Vec::new();
    while at < image.len() {
        let get = |offset: usize, len: usize| field(at + offset, len).ok_or_else(truncated);
        let (kind, header, size) = (get(0, 2)? as u16, get(4, 4)? as usize, get(8, 8)? as usize);
        let (packed, arch, flags) = (get(16, 4)? as usize, get(28, 4)? as u32, get(40, 8)?);
        let payload = image.get(at + header..at + header + size).ok_or_else(truncated)?;
        let packing = match flags & (LZ4 | ZSTD) {
            0 if packed == 0 => None,
            ZSTD => Some(Packing::Zstd),
            LZ4 => Some(Packing::Lz4),
            _ => return error(200, format!("the fatbin is packed in a way unknown: {flags:#x}")),
        };
        let (payload, unpacked) = match packing {
            None => (payload, size),
            // Padding follows.
            Some(_) => (payload.get(..packed).ok_or_else(truncated)?, get(56, 8)? as usize),
        };
        out.push(Entry { kind, arch, packing, payload, unpacked });
        at += header + size;
    }
    Ok(out)
}

/// The PTX text in `image` that a driver for `arch` would compile: the newest that the device can
/// run. Architecture-specific PTX (`sm_90a`) fits that very architecture only.
pub fn choose(image: &[u8], arch: u32) -> Result<String, ImageError> {
    if !image.starts_with(&MAGIC.to_le_bytes()) {
        let text = String::from_utf8_lossy(image).into_owned();
        let (target, specific) = target(&text);
        if target > arch || specific && target != arch {
            return error(209, format!("the PTX targets sm_{target}, the device is sm_{arch}"));
        }
        return Ok(text);
    }
    let mut entries = entries(image)?;
    let seen: Vec<_> = entries
        .iter()
        .map(|entry| match entry.kind {
            KIND_PTX => format!("PTX sm_{}", entry.arch),
            _ => format!("SASS sm_{}", entry.arch),
        })
        .collect();
    entries.retain(|entry| entry.kind == KIND_PTX && entry.arch <= arch);
    entries.sort_by_key(|entry| Reverse(entry.arch));
    let mut best: Option<(u32, bool, String)> = None;
    for entry in entries {
        if best.as_ref().is_some_and(|(found, ..)| *found > entry.arch) {
            break;
        }
        let text = entry.text()?;
        let (target, specific) = target(&text);
        let fits = if specific { target == arch } else { target <= arch };
        let better = best.as_ref().is_none_or(|(t, s, _)| (target, specific) > (*t, *s));
        if fits && better {
            best = Some((target, specific, text));
        }
    }
    match best {
        Some((_, _, text)) => Ok(text),
        None => error(209, format!("no PTX for sm_{arch} among: {}", seen.join(", "))),
    }
}

/// The architecture that a text's `.target` names, and whether it is a specific one.
fn target(text: &str) -> (u32, bool) {
    let name = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(".target"))
        .map_or("", |rest| rest.trim().split([',', ' ']).next().unwrap_or(""));
    let digits = name.trim_start_matches("sm_");
    let specific = digits.ends_with(['a', 'f']);
    (digits.trim_end_matches(['a', 'f']).parse().unwrap_or(0), specific)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ptx(target: &str) -> Vec<u8> {
        format!(".version 9.0\n.target {target}\n.address_size 64\n\0").into_bytes()
    }

    /// Entries: kind, chip, flags, payload. What the flags say is packed is so many bytes unpacked.
    fn fatbin(parts: &[(u16, u32, u64, Vec<u8>)], unpacked: usize) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, arch, flags, payload) in parts {
            let mut header = vec![0; 64];
            if *flags != 0 {
                header[16..20].copy_from_slice(&(payload.len() as u32).to_le_bytes());
                header[56..64].copy_from_slice(&(unpacked as u64).to_le_bytes());
            }
            let mut payload = payload.clone();
            payload.resize(payload.len().next_multiple_of(8), 0);
            header[..2].copy_from_slice(&kind.to_le_bytes());
            header[4..8].copy_from_slice(&64_u32.to_le_bytes());
            header[8..16].copy_from_slice(&(payload.len() as u64).to_le_bytes());
            header[28..32].copy_from_slice(&arch.to_le_bytes());
            header[40..48].copy_from_slice(&flags.to_le_bytes());
            body.extend(header);
            body.extend(payload);
        }
        let mut out = MAGIC.to_le_bytes().to_vec();
        out.extend([1, 0, 16, 0]);
        out.extend((body.len() as u64).to_le_bytes());
        out.extend(body);
        out
    }

    #[test]
    fn the_newest_that_fits_is_chosen() {
        let image = fatbin(
            &[
                (2, 80, 0, vec![0; 40]),
                (1, 75, 0, ptx("sm_75")),
                (1, 90, 0, ptx("sm_90a")),
                (1, 80, 0, ptx("sm_80, debug")),
            ],
            0,
        );
        let pick = |arch| choose(&image, arch).map(|t| target(&t));
        assert_eq!(pick(75).unwrap(), (75, false));
        assert_eq!(pick(86).unwrap(), (80, false));
        assert_eq!(pick(90).unwrap(), (90, true));
        assert_eq!(pick(100).unwrap(), (80, false));
        assert_eq!(pick(61).unwrap_err().code, 209);
    }

    #[test]
    fn packed_images_are_unpacked() {
        use ruzstd::encoding::{CompressionLevel, compress_to_vec};

        let text = ptx("sm_80");
        for (flags, packed) in [
            (ZSTD, compress_to_vec(&text[..], CompressionLevel::Fastest)),
            (LZ4, lz4_flex::block::compress(&text)),
        ] {
            let image = |unpacked| fatbin(&[(1, 80, flags | 0x11, packed.clone())], unpacked);
            assert_eq!(choose(&image(text.len()), 80).unwrap().as_bytes(), &text[..text.len() - 1]);
            for wrong in [text.len() - 1, text.len() + 1] {
                assert_eq!(choose(&image(wrong), 80).unwrap_err().code, 200, "{flags:#x}");
            }
            let mut broken = packed.clone();
            broken.truncate(packed.len() / 2);
            let image = fatbin(&[(1, 80, flags, broken)], text.len());
            assert_eq!(choose(&image, 80).unwrap_err().code, 200, "{flags:#x}");
        }
        let image = fatbin(&[(1, 80, LZ4 | ZSTD, text.clone())], text.len());
        assert!(choose(&image, 80).unwrap_err().text.contains("0xa000"));
    }

    #[test]
    fn truncated_images_say_so() {
        let image = fatbin(&[(1, 80, 0, ptx("sm_80"))], 0);
        assert_eq!(choose(&image[..image.len() - 5], 80).unwrap_err().code, 200);
        // SAFETY: the bytes are a whole image.
        assert_eq!(unsafe { copy(image.as_ptr()) }.unwrap(), image);
    }
}
