//! A viewer at the guest's console.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, bail};

use crate::patience::{PATIENCE, wait_for};
use crate::vm::Vm;

/// One connection, and all that came over it.
#[derive(Debug)]
pub struct Console {
    stream: UnixStream,
    seen: Vec<u8>,
}

impl Console {
    /// Connects.
    pub fn open(vm: &Vm) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(vm.dir().join("console.sock"))?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            seen: Vec::new(),
        })
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) -> anyhow::Result<()> {
        Ok(self.stream.write_all(format!("{line}\n").as_bytes())?)
    }

    /// All that came so far.
    pub fn seen(&mut self) -> anyhow::Result<String> {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the console closed the connection"),
                Ok(n) => self.seen.extend(&buffer[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("the console's socket"),
            }
        }
        Ok(String::from_utf8_lossy(&self.seen).into_owned())
    }

    /// Waits until `text` has come `times` times.
    pub fn wait(&mut self, text: &str, times: usize) -> anyhow::Result<()> {
        wait_for(&format!("`{text}` on the console"), PATIENCE, || {
            let seen = self.seen()?.matches(text).count();
            Ok((seen >= times).then_some(()))
        })
        .with_context(|| format!("it shows {:?}", String::from_utf8_lossy(&self.seen)))
    }

    /// Types a command and waits for its answer, which must not have been there before.
    pub fn ask(&mut self, command: &str, answer: &str) -> anyhow::Result<()> {
        let before = self.seen()?.matches(answer).count();
        self.type_line(command)?;
        self.wait(answer, before + 1)
    }
}
