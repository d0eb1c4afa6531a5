//! Where in a host's memory a carve-out can lie. Pure.

use std::ops::Range;

/// What it is aligned to.
const ALIGN: u64 = 1 << 30;
/// Below this kernels, boot loaders and old devices have what they need.
const LOW: u64 = 4 << 30;
/// What is left to the host's own kernel at the least.
const LEFT: u64 = 1 << 30;

/// Ranges of RAM in `/proc/iomem`'s text. Without the right to see addresses, they are all zero.
pub(super) fn ranges(text: &str) -> Vec<Range<u64>> {
    let line = |line: &str| {
        let (range, name) = line.split_once(" : ")?;
        let (start, end) = range.split_once('-')?;
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?.checked_add(1)?);
        (name == "System RAM" && end > start + 1).then_some(start..end)
    };
    text.lines().filter_map(line).collect()
}

/// The highest place of `size` bytes, above 4 GiB, that leaves the host something.
pub(super) fn place(ram: &[Range<u64>], size: u64) -> Result<u64, String> {
    if size == 0 || !size.is_multiple_of(2 << 20) {
        return Err(format!("a carve-out of {size} bytes is not of whole 2 MiB"));
    }
    if ram.is_empty() {
        return Err("/proc/iomem does not say where this host's memory lies; ask as root".into());
    }
    let all: u64 = ram.iter().map(|range| range.end - range.start).sum();
    if all.saturating_sub(size) < LEFT {
        return Err(format!(
            "a carve-out of {} MiB leaves this host less than {} of its {} MiB",
            size >> 20,
            LEFT >> 20,
            all >> 20
        ));
    }
    let fitting = ram.iter().filter_map(|range| {
        let at = range.end.checked_sub(size)? / ALIGN * ALIGN;
        (at >= range.start.max(LOW)).then_some(at)
    });
    fitting.max().ok_or_else(|| {
        format!(
            "no range of this host's memory above 4 GiB holds {} MiB, aligned to {} MiB",
            size >> 20,
            ALIGN >> 20
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "00001000-0009fbff : System RAM\n\
                       00100000-bffd8fff : System RAM\n  01000000-01ffffff : Kernel code\n\
                       100000000-43fffffff : System RAM\nfee00000-fee00fff : Local APIC\n";
    const G: u64 = 1 << 30;

    #[test]
    fn the_highest_place_above_4_gib_is_taken() {
        let ram = ranges(MAP);
        assert_eq!(ram.len(), 3);
        assert_eq!(place(&ram, 8 * G), Ok(9 * G));
        assert_eq!(place(&ram, 3 * G / 2), Ok(15 * G), "aligned");
        assert!(place(&ram, 14 * G).is_err_and(|why| why.contains("no range")));
        assert!(place(&ram, 16 * G).is_err_and(|why| why.contains("leaves this host")));
        assert!(place(&ram, 3).is_err_and(|why| why.contains("2 MiB")));
    }

    #[test]
    fn who_may_not_see_addresses_is_told() {
        let hidden = "00000000-00000000 : System RAM\n00000000-00000000 : System RAM\n";
        assert!(place(&ranges(hidden), G).is_err_and(|why| why.contains("as root")));
    }
}
