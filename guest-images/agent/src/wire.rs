//! One JSON object a line, within bounds.
//!
//! The other side is not trusted: a line that never ends is thrown away as it comes and then
//! refused, and what isn't a request is refused with a [`Problem`]. Neither ends the connection.

use std::io::{self, BufRead, BufReader, Read, Write};

use serde::Serialize;

use crate::protocol::{Answer, Code, MAX_LINE, Problem, Request};

/// Lines of a stream.
#[derive(Debug)]
pub struct Lines<R> {
    stream: BufReader<R>,
    limit: usize,
}

/// One line, without its newline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// All of it.
    Whole(Vec<u8>),
    /// It was longer than the limit, and is lost.
    TooLong,
}

impl<R: Read> Lines<R> {
    /// Lines of at most [`MAX_LINE`] bytes.
    pub fn new(stream: R) -> Self {
        Self::with_limit(stream, MAX_LINE)
    }

    /// Lines of at most `limit` bytes.
    pub fn with_limit(stream: R, limit: usize) -> Self {
        let stream = BufReader::new(stream);
        Self { stream, limit }
    }

    /// What the lines are read from.
    pub fn stream(&self) -> &R {
        self.stream.get_ref()
    }

    /// What the lines are read from, to write to it.
    pub fn stream_mut(&mut self) -> &mut R {
        self.stream.get_mut()
    }

    /// The next line; none at the end. A last line without a newline is no line.
    pub fn next_line(&mut self) -> io::Result<Option<Line>> {
        let mut line = Vec::new();
        let mut length = 0_usize;
        loop {
            let bytes = match self.stream.fill_buf() {
                Ok([]) => return Ok(None),
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let part = &bytes[..end.unwrap_or(bytes.len())];
            length = length.saturating_add(part.len());
            if length <= self.limit {
                line.extend_from_slice(part);
            }
            let used = part.len() + usize::from(end.is_some());
            self.stream.consume(used);
            if end.is_some() {
                let fits = length <= self.limit;
                return Ok(Some(if fits {
                    Line::Whole(line)
                } else {
                    Line::TooLong
                }));
            }
        }
    }
}

/// Writes one object as a line.
pub fn write_line(stream: &mut impl Write, object: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(object)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.flush()
}

/// An answer as a line; one that is too long for the other side becomes an error.
pub fn write_answer<T: Serialize>(stream: &mut impl Write, answer: &Answer<T>) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    if line.len() > MAX_LINE {
        let text = format!(
            "the answer has {} bytes, more than a line may have",
            line.len()
        );
        let problem = Problem {
            code: Code::TooLong,
            text,
        };
        line = serde_json::to_vec(&Answer::<()>::Error(problem))?;
    }
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.flush()
}

/// Makes a request of a line.
pub fn decode(line: &Line) -> Result<Request, Problem> {
    let refuse = |code, text| Err(Problem { code, text });
    let Line::Whole(line) = line else {
        return refuse(
            Code::TooLong,
            format!("a line has at most {MAX_LINE} bytes"),
        );
    };
    match serde_json::from_slice(line) {
        Ok(request) => Ok(request),
        // serde's internally tagged enums have no error of their own for a tag they don't know.
        Err(error) if error.to_string().starts_with("unknown variant") => {
            refuse(Code::Unknown, format!("no such request: {error}"))
        }
        Err(error) => refuse(Code::Malformed, format!("this is not a request: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(text: &str) -> Line {
        Line::Whole(text.as_bytes().to_vec())
    }

    fn code(text: &str) -> Code {
        decode(&whole(text)).unwrap_err().code
    }

    #[test]
    fn lines_are_cut_at_newlines_and_bounded() {
        let text: &[u8] = b"one\n\n0123456789\nabcdefghij-too-long\nlast\nno newline";
        let mut lines = Lines::with_limit(text, 10);
        let mut got = Vec::new();
        while let Some(line) = lines.next_line().unwrap() {
            got.push(line);
        }
        let expected = [
            whole("one"),
            whole(""),
            whole("0123456789"),
            Line::TooLong,
            whole("last"),
        ];
        assert_eq!(got, expected);
    }

    #[test]
    fn what_is_no_request_is_refused_by_code() {
        assert_eq!(code("{\"do\":\"dance\"}"), Code::Unknown);
        assert_eq!(code("{\"do\":\"exec\"}"), Code::Malformed);
        assert_eq!(code("{}"), Code::Malformed);
        assert_eq!(code("[1]"), Code::Malformed);
        assert_eq!(code(""), Code::Malformed);
        assert_eq!(code(&"[".repeat(100_000)), Code::Malformed);
        assert_eq!(decode(&Line::TooLong).unwrap_err().code, Code::TooLong);
    }

    #[test]
    fn unknown_fields_are_a_later_releases() {
        let request = decode(&whole("{\"do\":\"health\",\"since\":3}")).unwrap();
        assert_eq!(request, Request::Health);
    }

    /// Bytes at random, and requests with some of their bytes changed: never a panic, and what
    /// is taken for a request is one.
    #[test]
    fn the_decoder_stands_anything() {
        let good = [
            "{\"do\":\"health\"}",
            "{\"do\":\"exec\",\"program\":\"/bin/true\",\"args\":[\"a\"],\"time_limit_ms\":5}",
            "{\"do\":\"poll\",\"job\":1,\"wait_ms\":18446744073709551615}",
            "{\"do\":\"gaps_start\",\"duration_ms\":1,\"duty_percent\":255}",
            "{\"do\":\"shutdown\",\"how\":\"reboot\"}",
        ];
        let mut random = fastrand::Rng::with_seed(3);
        let mut taken = 0;
        for round in 0..20_000_usize {
            let mut line = good[round % good.len()].as_bytes().to_vec();
            if round % 7 == 0 {
                line = (0..random.usize(..200)).map(|_| random.u8(..)).collect();
            }
            for _ in 0..random.usize(..4) {
                match (line.is_empty(), random.bool()) {
                    (false, true) => {
                        let at = random.usize(..line.len());
                        line[at] = random.u8(..);
                    }
                    _ => line.truncate(random.usize(..=line.len())),
                }
            }
            match decode(&Line::Whole(line)) {
                Ok(request) => {
                    taken += 1;
                    let again = serde_json::to_vec(&request).unwrap();
                    assert_eq!(decode(&Line::Whole(again)), Ok(request));
                }
                Err(problem) => assert!(!problem.text.is_empty()),
            }
        }
        assert!(
            taken > 1000,
            "only {taken}: the test no longer makes requests"
        );
    }
}
