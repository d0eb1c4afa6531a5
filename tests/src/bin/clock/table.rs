//! The table that people read.

use stillpoint_tests::clocks::figures::{Figure, Verdict};

/// Longest of what was measured that is shown; the report has it whole.
const WIDEST: usize = 120;

/// A line for each figure, columns aligned.
pub(crate) fn of(figures: &[Figure]) -> String {
    let cut = |text: &str| match text.chars().count() {
        0..=WIDEST => text.to_owned(),
        _ => text.chars().take(WIDEST - 1).chain(['…']).collect(),
    };
    let rows: Vec<[String; 4]> = figures
        .iter()
        .map(|f| {
            [
                word(f.verdict).into(),
                f.name.clone(),
                f.bound.clone(),
                cut(&f.measured),
            ]
        })
        .collect();
    let head = ["", "FIGURE", "BOUND", "MEASURED"].map(str::to_owned);
    let width = |column: usize| {
        let cells = rows
            .iter()
            .chain([&head])
            .map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths = [width(0), width(1), width(2)];
    let line = |row: &[String; 4]| {
        let cell = |column: usize| {
            let pad = widths[column] - row[column].chars().count();
            format!("{}{}", row[column], " ".repeat(pad))
        };
        format!("{}  {}  {}  {}\n", cell(0), cell(1), cell(2), row[3])
    };
    [&head].into_iter().chain(&rows).map(line).collect()
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Kept => "kept",
        Verdict::Broken => "BROKEN",
        Verdict::Skipped => "skipped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_long_words_cut() {
        let text = of(&[Figure::skipped("a", "b", &"x".repeat(200))]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0].find("BOUND"), lines[1].find('b'));
        assert!(lines[1].ends_with('…') && lines[1].starts_with("skipped"));
    }
}
