//! The kernel's command line.

/// Words of the form `name=value`.
#[derive(Debug)]
pub(super) struct Cmdline(Vec<(String, String)>);

impl Cmdline {
    /// This boot's; an empty one if it can't be read.
    pub(super) fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    /// Quotes are the kernel's (lib/cmdline.c, `next_arg`): around a word or its value, to hold
    /// spaces; there is no escaping.
    fn parse(text: &str) -> Self {
        let mut quoted = false;
        let words = text.trim().split(|letter: char| {
            quoted ^= letter == '"';
            letter.is_ascii_whitespace() && !quoted
        });
        let pair = |word: &str| {
            let word = word.replace('"', "");
            let (name, value) = word.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        };
        Self(words.filter_map(pair).collect())
    }

    /// The last value of a name.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let pair = self.0.iter().rev().find(|(known, _)| known == name);
        pair.map(|(_, value)| value.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_and_quotes_hold_spaces() {
        let text =
            "console=ttyS0 quiet agent.run=\"/bin/a b=c\" \"x.y=1 2\" agent.ip=1 agent.ip=2\n";
        let cmdline = Cmdline::parse(text);
        assert_eq!(cmdline.get("agent.run"), Some("/bin/a b=c"));
        assert_eq!(cmdline.get("x.y"), Some("1 2"));
        assert_eq!(cmdline.get("agent.ip"), Some("2"));
        assert_eq!(cmdline.get("quiet"), None);
    }
}
