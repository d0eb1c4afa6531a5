//! "3" or "20%": how many of a number not known yet.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of things, or a share of however many there turn out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Amount {
    /// So many.
    Count(u32),
    /// So many hundredths of a percent.
    Share(u16),
}

impl Amount {
    /// That many percent.
    pub const fn percent(percent: u16) -> Self {
        Self::Share(percent * 100)
    }

    /// Of `total`, rounded down: for what may be taken away.
    pub fn at_most(self, total: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Share(share) => scaled(total, share, 0),
        }
    }

    /// Of `total`, rounded up, and never more than there are: for what must be tried.
    pub fn at_least(self, total: u32) -> u32 {
        match self {
            Self::Count(count) => count.min(total),
            Self::Share(share) => scaled(total, share, 9_999).min(total),
        }
    }
}

fn scaled(total: u32, share: u16, round_up: u64) -> u32 {
    let scaled = (u64::from(total) * u64::from(share) + round_up) / 10_000;
    u32::try_from(scaled).unwrap_or(u32::MAX)
}

/// Text that is no amount.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no amount; write a number such as 3, or a share such as 20% or 0.5%")]
pub struct NoAmount(String);

impl FromStr for Amount {
    type Err = NoAmount;
    fn from_str(text: &str) -> Result<Self, NoAmount> {
        let wrong = || NoAmount(text.to_owned());
        let Some(number) = text.strip_suffix('%') else {
            return text.parse().map(Self::Count).map_err(|_| wrong());
        };
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(part) || part.len() > 2 {
            return Err(wrong());
        }
        let whole: u16 = whole.parse().map_err(|_| wrong())?;
        let hundredths: u16 = format!("{part:0<2}").parse().map_err(|_| wrong())?;
        let share = whole
            .checked_mul(100)
            .and_then(|w| w.checked_add(hundredths));
        match share {
            Some(share @ 0..=10_000) => Ok(Self::Share(share)),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for Amount {
    type Error = NoAmount;
    fn try_from(text: String) -> Result<Self, NoAmount> {
        text.parse()
    }
}

impl From<Amount> for String {
    fn from(amount: Amount) -> Self {
        amount.to_string()
    }
}

impl std::fmt::Display for Amount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Share(share) if share % 100 == 0 => write!(f, "{}%", share / 100),
            Self::Share(share) => write!(f, "{}.{:02}%", share / 100, share % 100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_round_towards_safety() {
        let fifth = Amount::percent(20);
        assert_eq!((fifth.at_most(12), fifth.at_least(12)), (2, 3));
        assert_eq!((fifth.at_most(4), fifth.at_least(4)), (0, 1));
        assert_eq!(Amount::Count(9).at_least(4), 4);
        assert_eq!(Amount::percent(100).at_most(u32::MAX), u32::MAX);
    }

    #[test]
    fn amounts_are_read_as_they_are_shown() {
        for text in ["0", "3", "20%", "0.50%", "12.25%", "100%"] {
            let amount: Amount = text.parse().expect(text);
            assert_eq!(amount.to_string(), text);
        }
        assert_eq!("0.5%".parse(), Ok(Amount::Share(50)));
        for bad in [
            "",
            "%",
            "-1",
            "101%",
            "1.234%",
            "1.%",
            "a",
            "+3%",
            "9999999999",
        ] {
            bad.parse::<Amount>().expect_err(bad);
        }
    }
}
