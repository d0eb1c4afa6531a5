//! Saved state as text, for the *golden states*: one of each release and format, kept in `golden/`
//! beside this crate so that no later release forgets how to read it. Only tests, fuzzers and
//! the builder (`make golden`) use this.
//!
//! Lines that begin with `#` are for people. All else is hexadecimal, with `ZxN` for N zero bytes in
//! a row: most of a processor's state is zeros.

use std::fmt::Write;

/// Hexadecimal digits in a line.
const WIDTH: usize = 96;
/// Shorter runs of zeros are written out.
const RUN: usize = 8;

/// Why a text is no golden state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a golden state: `{0}` is neither hexadecimal nor a run of zeros")]
pub struct NotGolden(String);

/// As text, with `about` above it.
pub fn to_text(about: &str, bytes: &[u8]) -> String {
    let mut text: String = about.lines().map(|line| format!("# {line}\n")).collect();
    let mut line = String::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let zeros = rest.iter().take_while(|byte| **byte == 0).count();
        let word = if zeros >= RUN {
            rest = &rest[zeros..];
            format!("Zx{zeros}")
        } else {
            let begins =
                |at: &usize| rest[*at..].iter().take(RUN).filter(|b| **b == 0).count() == RUN;
            let end = (1..rest.len())
                .find(begins)
                .unwrap_or(rest.len())
                .min(WIDTH / 2);
            let (now, later) = rest.split_at(end);
            rest = later;
            now.iter().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            })
        };
        if line.len() + word.len() > WIDTH && !line.is_empty() {
            text.push_str(line.trim_end());
            text.push('\n');
            line.clear();
        }
        line.push_str(&word);
        line.push(' ');
    }
    text.push_str(line.trim_end());
    text.push('\n');
    text
}

/// Back from text.
pub fn from_text(text: &str) -> Result<Vec<u8>, NotGolden> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let mut bytes = Vec::new();
    for word in lines.flat_map(str::split_whitespace) {
        let wrong = || NotGolden(word.to_owned());
        if let Some(zeros) = word.strip_prefix("Zx") {
            let zeros: usize = zeros.parse().map_err(|_| wrong())?;
            bytes.resize(bytes.len() + zeros, 0);
            continue;
        }
        if word.len() % 2 != 0 || !word.is_ascii() {
            return Err(wrong());
        }
        for at in (0..word.len()).step_by(2) {
            bytes.push(u8::from_str_radix(&word[at..at + 2], 16).map_err(|_| wrong())?);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let mut bytes: Vec<u8> = (0..=255).collect();
        bytes.extend([0; 7]);
        bytes.push(1);
        bytes.extend([0; 5000]);
        bytes.extend([9, 0, 0]);
        let text = to_text("what\nit is", &bytes);
        assert!(text.starts_with("# what\n# it is\n"), "{text}");
        assert!(text.lines().all(|line| line.len() <= WIDTH + 2), "{text}");
        assert_eq!(from_text(&text), Ok(bytes));
        assert!(from_text("0g").is_err() && from_text("abc").is_err());
    }
}
