//! What the gateway says: JSON in which 64-bit numbers are text, and what is zero is left out.

use serde_json::Value;

use super::EtcdError;

/// An answer, and whose it is.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) endpoint: String,
    pub(super) body: Value,
}

impl Answered {
    pub(super) fn unreadable(&self, problem: &str) -> EtcdError {
        EtcdError::Unreadable {
            endpoint: self.endpoint.clone(),
            problem: problem.into(),
        }
    }
}

/// A number, written as text or as a number.
pub(super) fn number<N: std::str::FromStr>(value: &Value, field: &str) -> Option<N> {
    match &value[field] {
        Value::String(text) => text.parse().ok(),
        Value::Number(number) => number.to_string().parse().ok(),
        _ => None,
    }
}

/// The first key after all that begin with `prefix`.
pub(super) fn after(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // All keys there are.
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_ends_where_its_prefix_does() {
        assert_eq!(after(b"/a/"), b"/a0");
        assert_eq!(after(&[1, 255]), [2]);
        assert_eq!(after(&[255]), [0]);
    }

    #[test]
    fn numbers_are_read_in_both_forms() {
        let value = serde_json::json!({ "a": "18446744073709551615", "b": 7 });
        assert_eq!(number(&value, "a"), Some(u64::MAX));
        assert_eq!(number(&value, "b"), Some(7_i64));
        assert_eq!(number::<u64>(&value, "c"), None);
    }
}
