//! The container that nvcc makes: finding the PTX that a device would take.

/// One entry of the container.
struct Entry<'a> {
    kind: u16,
    arch: u32,
    compressed: bool,
    payload: &'a [u8],
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
const COMPRESSED: u64 = 0x2000 | 0x8000;

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
        let (packed, arch, flags) = (get(16, 4)?, get(28, 4)? as u32, get(40, 8)?);
        let payload = image.get(at + header..at + header + size).ok_or_else(truncated)?;
        let compressed = packed != 0 || flags & COMPRESSED != 0;
        out.push(Entry { kind, arch, compressed, payload });
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
    let mut best: Option<(u32, bool, String)> = None;
    let mut seen = Vec::new();
    for entry in entries(image)? {
        if entry.kind != KIND_PTX {
            seen.push(format!("SASS sm_{}", entry.arch));
            continue;
        }
        if entry.compressed {
            return error(
                200,
                "the fatbin is compressed: build it with nvcc -Xfatbin -compress=false (or \
                 -no-compress)",
            );
        }
        let end = entry.payload.iter().position(|&b| b == 0).unwrap_or(entry.payload.len());
        let text = String::from_utf8_lossy(&entry.payload[..end]).into_owned();
        let (target, specific) = target(&text);
        seen.push(format!("PTX sm_{target}{}", if specific { "a" } else { "" }));
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

    fn fatbin(parts: &[(u16, u32, u64, Vec<u8>)]) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, arch, flags, payload) in parts {
            let mut header = vec![0; 64];
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
        let image = fatbin(&[
            (2, 80, 0, vec![0; 40]),
            (1, 75, 0, ptx("sm_75")),
            (1, 90, 0, ptx("sm_90a")),
            (1, 80, 0, ptx("sm_80, debug")),
        ]);
        let pick = |arch| choose(&image, arch).map(|t| target(&t));
        assert_eq!(pick(75).unwrap(), (75, false));
        assert_eq!(pick(86).unwrap(), (80, false));
        assert_eq!(pick(90).unwrap(), (90, true));
        assert_eq!(pick(100).unwrap(), (80, false));
        assert_eq!(pick(61).unwrap_err().code, 209);
    }

    #[test]
    fn compressed_and_truncated_images_say_so() {
        let image = fatbin(&[(1, 80, 0x2000, ptx("sm_80"))]);
        assert!(choose(&image, 80).unwrap_err().text.contains("compress"));
        let image = fatbin(&[(1, 80, 0, ptx("sm_80"))]);
        assert_eq!(choose(&image[..image.len() - 5], 80).unwrap_err().code, 200);
        // SAFETY: the bytes are a whole image.
        assert_eq!(unsafe { copy(image.as_ptr()) }.unwrap(), image);
    }
}
