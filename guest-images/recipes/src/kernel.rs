//! `vmlinux` out of a `bzImage`: the ELF file that a boot protocol without a decompressor wants.
//!
//! The kernel's boot protocol (Documentation/arch/x86/boot.rst, "payload_offset") says where in the
//! protected-mode part the compressed ELF lies; its last four bytes are the size it unpacks to
//! (scripts/Makefile.lib, "size_append"). Debian uses LZ4 in 6.1 and Zstandard since.

use std::io::Read;

/// Why there is no `vmlinux` in it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PayloadError {
    /// No boot sector signature or no `HdrS`.
    #[error("this is no bzImage")]
    NotAKernel,
    /// Boot protocol older than 2.08 has no payload fields.
    #[error("the boot protocol is {0:#x}; a payload is named from 0x208 on")]
    TooOld(u16),
    /// The header names bytes that aren't there.
    #[error("the payload ({offset:#x}+{length:#x}) ends behind the image's {size:#x} bytes")]
    Truncated {
        /// Where it begins.
        offset: usize,
        /// Its length.
        length: usize,
        /// The image's.
        size: usize,
    },
    /// A compression that none of our kernels has.
    #[error("the payload begins with {0:02x?}: neither LZ4 nor Zstandard")]
    Compression([u8; 4]),
    /// It does not unpack.
    #[error("unpacking the payload: {0}")]
    Corrupt(String),
    /// It unpacks to something else.
    #[error("the payload unpacks to no ELF file of {0} bytes")]
    NotElf(usize),
}

const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Blocks of the legacy LZ4 frame unpack to at most this (lib/decompress_unlz4.c).
const LZ4_BLOCK: usize = 8 << 20;

/// The kernel's ELF file.
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let payload = payload(image)?;
    let (size_at, packed) = match payload.len().checked_sub(4) {
        Some(at) => (&payload[at..], &payload[..at]),
        None => return Err(PayloadError::Corrupt("it is empty".into())),
    };
    let size = number(size_at, 0);
    let elf = match packed.first_chunk() {
        Some(&LZ4_LEGACY) => unlz4(&packed[4..])?,
        Some(&ZSTD) => unzstd(packed)?,
        Some(&other) => return Err(PayloadError::Compression(other)),
        None => return Err(PayloadError::Corrupt("it is empty".into())),
    };
    if elf.len() != size || !elf.starts_with(b"\x7fELF") {
        return Err(PayloadError::NotElf(size));
    }
    Ok(elf)
}

fn payload(image: &[u8]) -> Result<&[u8], PayloadError> {
    if image.len() < 0x250 || image[0x1fe..0x200] != [0x55, 0xaa] || &image[0x202..0x206] != b"HdrS"
    {
        return Err(PayloadError::NotAKernel);
    }
    let version = u16::from_le_bytes([image[0x206], image[0x207]]);
    if version < 0x208 {
        return Err(PayloadError::TooOld(version));
    }
    // No setup sectors means four, says the protocol.
    let sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let offset = (sectors + 1) * 512 + number(image, 0x248);
    let length = number(image, 0x24c);
    let end = offset.checked_add(length);
    end.and_then(|end| image.get(offset..end))
        .ok_or(PayloadError::Truncated {
            offset,
            length,
            size: image.len(),
        })
}

/// A little-endian `u32`; the caller knows that it is there.
fn number(bytes: &[u8], at: usize) -> usize {
    let word = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    u32::from_le_bytes(word) as usize
}

/// Legacy frame: blocks, each behind its size; the kernel build appends nothing but its size word.
fn unlz4(mut blocks: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let corrupt = |why: &str| PayloadError::Corrupt(format!("LZ4: {why}"));
    let mut out = Vec::new();
    while blocks.len() >= 4 {
        let size = number(blocks, 0);
        let block = blocks
            .get(4..4 + size)
            .ok_or_else(|| corrupt("a block ends early"))?;
        let plain = lz4_flex::block::decompress(block, LZ4_BLOCK);
        out.extend(plain.map_err(|error| corrupt(&error.to_string()))?);
        blocks = &blocks[4 + size..];
    }
    Ok(out)
}

fn unzstd(packed: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let corrupt =
        |error: &dyn std::fmt::Display| PayloadError::Corrupt(format!("Zstandard: {error}"));
    let mut out = Vec::new();
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(packed).map_err(|e| corrupt(&e))?;
    decoder.read_to_end(&mut out).map_err(|e| corrupt(&e))?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage of one setup sector with this payload.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        let length = u32::try_from(payload.len()).expect("small");
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image
    }

    fn lz4(plain: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_vec();
        for chunk in plain.chunks(100) {
            let block = lz4_flex::block::compress(chunk);
            payload.extend(u32::try_from(block.len()).expect("small").to_le_bytes());
            payload.extend(block);
        }
        payload.extend(u32::try_from(plain.len()).expect("small").to_le_bytes());
        payload
    }

    #[test]
    fn an_elf_comes_out_as_it_went_in() {
        let plain: Vec<u8> = b"\x7fELF"
            .iter()
            .copied()
            .chain((0..300).map(|n| (n % 7) as u8))
            .collect();
        assert_eq!(vmlinux(&image(&lz4(&plain))), Ok(plain.clone()));
        let mut payload = ruzstd::encoding::compress_to_vec(
            plain.as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        payload.extend(u32::try_from(plain.len()).expect("small").to_le_bytes());
        assert_eq!(vmlinux(&image(&payload)), Ok(plain));
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert_eq!(vmlinux(b"hello"), Err(PayloadError::NotAKernel));
        assert_eq!(vmlinux(&[0; 4096]), Err(PayloadError::NotAKernel));
        assert_eq!(
            vmlinux(&image(b"GARBAGE!")),
            Err(PayloadError::Compression(*b"GARB"))
        );
        let short = image(&lz4(b"\x7fELFxxxx"));
        let cut = vmlinux(&short[..short.len() - 2]);
        assert!(matches!(cut, Err(PayloadError::Truncated { .. })));
        assert_eq!(
            vmlinux(&image(&lz4(b"not ELF"))),
            Err(PayloadError::NotElf(7))
        );
    }

    #[test]
    fn every_byte_may_be_wrong_without_a_panic() {
        let good = image(&lz4(&[b"\x7fELF".as_slice(), &[5; 60]].concat()));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            let _ = vmlinux(&bad);
        }
    }
}
