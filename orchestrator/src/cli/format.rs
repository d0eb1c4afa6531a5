//! Numbers, times and tables as people read them.

use std::time::Duration;

/// A time with three digits and a fitting unit.
pub(crate) fn time(duration: Duration) -> String {
    let ns = duration.as_nanos();
    #[allow(clippy::cast_precision_loss)] // Three digits are shown.
    let ns_f = ns as f64;
    let (value, unit) = match ns {
        0..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (ns_f / 1e3, "µs"),
        1_000_000..1_000_000_000 => (ns_f / 1e6, "ms"),
        _ => (ns_f / 1e9, "s"),
    };
    let decimals = if value < 10.0 {
        2
    } else {
        usize::from(value < 100.0)
    };
    format!("{value:.decimals$} {unit}")
}

/// A signed time.
pub(crate) fn signed_time(ns: i64) -> String {
    let sign = if ns < 0 { "-" } else { "+" };
    format!("{sign}{}", time(Duration::from_nanos(ns.unsigned_abs())))
}

/// A size in the largest unit that divides it.
pub(crate) fn size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes > 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

/// A time as our API has it.
pub(super) fn whole_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// How long it is until then.
pub(crate) fn until(unix_s: u64) -> String {
    let seconds = unix_s.saturating_sub(crate::execute::unix_ns() / 1_000_000_000);
    match seconds {
        0 => "now".into(),
        1..120 => format!("in {seconds} s"),
        120..7_200 => format!("in {} min", seconds / 60),
        _ => format!("in {} h", seconds / 3600),
    }
}

/// How long ago that was.
pub(crate) fn ago(unix_ns: u64) -> String {
    let seconds = crate::execute::unix_ns().saturating_sub(unix_ns) / 1_000_000_000;
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// A bar of up to `width` cells for `part` of `whole`; anything above zero shows.
pub(super) fn bar(part: Duration, whole: Duration, width: u128) -> String {
    const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let eighths = (part.as_nanos() * width * 8)
        .checked_div(whole.as_nanos())
        .unwrap_or(0)
        .min(width * 8);
    let eighths = usize::try_from(eighths).unwrap_or(0);
    let eighths = if part.is_zero() { 0 } else { eighths.max(1) };
    let mut text = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        text.push(EIGHTHS[eighths % 8]);
    }
    text
}

/// A table with aligned columns, two blanks between; `right` names those aligned right.
pub(super) fn table(head: &[&str], right: &[usize], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let lines: Vec<&Vec<String>> = std::iter::once(&head).chain(rows).collect();
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let mut shown = String::new();
        for (column, cell) in line.iter().enumerate() {
            let width = widths.get(column).copied().unwrap_or(0);
            if right.contains(&column) {
                shown.push_str(&format!("{cell:>width$}  "));
            } else {
                shown.push_str(&format!("{cell:<width$}  "));
            }
        }
        text.push_str(shown.trim_end());
        text.push('\n');
    }
    text
}

/// Reads a time such as `500ms`, `1.5s` or `250us`.
pub(super) fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time; write 500ms, 1.5s, 250us, 15min or 2h");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == 'µ');
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    let scale = match &text[digits.len()..] {
        "h" => 3600.0,
        "min" => 60.0,
        "s" => 1.0,
        "ms" => 1e-3,
        "us" | "µs" => 1e-6,
        "ns" => 1e-9,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * scale).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        assert_eq!(time(Duration::from_nanos(7)), "7 ns");
        assert_eq!(time(Duration::from_nanos(1_234)), "1.23 µs");
        assert_eq!(time(Duration::from_micros(412)), "412 µs");
        assert_eq!(time(Duration::from_micros(12_345)), "12.3 ms");
        assert_eq!(time(Duration::from_secs(30)), "30.0 s");
        assert_eq!(signed_time(-3), "-3 ns");
        assert_eq!(size(256 << 20), "256 MiB");
    }

    #[test]
    fn times_are_read() {
        assert_eq!(parse_time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_time("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_time("250us"), Ok(Duration::from_micros(250)));
        for bad in ["", "5", "-1s", "1d", "s", "1e400s"] {
            parse_time(bad).expect_err(bad);
        }
    }

    #[test]
    fn bars_show_what_is_small_and_stop_at_the_width() {
        let ms = Duration::from_millis;
        assert_eq!(bar(ms(10), ms(10), 4), "████");
        assert_eq!(bar(ms(99), ms(10), 4), "████");
        assert_eq!(bar(ms(1), ms(1000), 4), "▏");
        assert_eq!(bar(ms(0), ms(10), 4), "");
        assert_eq!(bar(ms(1), ms(0), 4), "▏");
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![
            vec!["a".into(), "10".into()],
            vec!["long".into(), "5".into()],
        ];
        let text = table(&["NAME", "N"], &[1], &rows);
        assert_eq!(text, "NAME   N\na     10\nlong   5\n");
    }
}
