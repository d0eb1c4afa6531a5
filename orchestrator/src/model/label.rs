//! Labels of hosts: what an operator calls hosts by that have something in common.

use std::collections::BTreeMap;
use std::str::FromStr;

/// The longest name or value of a label, bytes.
const LONGEST: usize = 63;
/// The most labels of a host.
pub const MOST_LABELS: usize = 32;

/// Labels, by their names.
pub type Labels = BTreeMap<String, String>;

/// A label: `NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label {
    /// Its name.
    pub name: String,
    /// Its value, which may be empty.
    pub value: String,
}

/// Text that is no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no label; write NAME=VALUE, each of at most {LONGEST} of a-z A-Z 0-9 . _ / -, and a value may be empty"
)]
pub struct NoLabel(String);

/// What labels can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelsError {
    /// One name, two values.
    #[error("the label `{0}` is given twice")]
    Twice(String),
    /// Too many.
    #[error("{0} labels are too many; a host has {MOST_LABELS} at most")]
    Many(usize),
}

impl FromStr for Label {
    type Err = NoLabel;

    fn from_str(text: &str) -> Result<Self, NoLabel> {
        let plain = |text: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "._/-".contains(c);
            text.len() <= LONGEST && text.chars().all(plain)
        };
        let found = text.split_once('=');
        let found = found.filter(|(name, value)| !name.is_empty() && plain(name) && plain(value));
        let (name, value) = found.ok_or_else(|| NoLabel(text.to_owned()))?;
        Ok(Self {
            name: name.to_owned(),
            value: value.to_owned(),
        })
    }
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

/// The labels of a host.
///
/// # Errors
/// There are too many, or two of one name.
pub fn labels(given: Vec<Label>) -> Result<Labels, LabelsError> {
    if given.len() > MOST_LABELS {
        return Err(LabelsError::Many(given.len()));
    }
    let mut labels = Labels::new();
    for Label { name, value } in given {
        if labels.insert(name.clone(), value).is_some() {
            return Err(LabelsError::Twice(name));
        }
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_have_a_name_and_a_value_and_each_name_once() {
        let label = |text: &str| text.parse::<Label>();
        for text in ["rack=7", "example.com/class=big", "spare="] {
            assert_eq!(label(text).expect(text).to_string(), text);
        }
        let long = format!("{}=x", "n".repeat(64));
        for text in ["", "=x", "rack", "a b=c", "a=b=c", long.as_str()] {
            label(text).expect_err(text);
        }
        let both = |a: &str, b: &str| labels(vec![label(a).expect(a), label(b).expect(b)]);
        assert_eq!(both("a=1", "b=2").expect("two").len(), 2);
        assert_eq!(both("a=1", "a=2"), Err(LabelsError::Twice("a".into())));
        let many = (0..33).map(|n| label(&format!("l{n}=")).expect("a label"));
        assert_eq!(labels(many.collect()), Err(LabelsError::Many(33)));
    }
}
