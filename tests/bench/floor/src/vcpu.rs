//! One vCPU's thread: runs until kicked, then hands over its state; or the other way round.
#![allow(unsafe_code)] // the kick: a signal, and a byte of the shared run page

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, bail};
use kvm_bindings::Msrs;
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::devices::Devices;
use crate::state::VcpuState;
use crate::wire::now_ns;

/// What a vCPU's thread tells.
pub(crate) enum News {
    /// It is about to run the guest, at this time.
    Running(u64),
    /// It was kicked; here is all of it.
    Stopped(usize, Box<VcpuState>),
    /// It cannot go on.
    Failed(anyhow::Error),
}

/// The control side of a vCPU's thread.
pub(crate) struct Vcpu {
    start: Sender<Option<Box<VcpuState>>>,
    stop: Arc<AtomicBool>,
    immediate_exit: &'static AtomicU8,
    thread: JoinHandle<()>,
}

/// The thread's own side.
struct Runner {
    index: usize,
    fd: VcpuFd,
    msrs: Msrs,
    stop: Arc<AtomicBool>,
    devices: Arc<Devices>,
}

extern "C" fn on_kick(_: libc::c_int) {}

/// Makes the kick's signal interrupt a run and do nothing else.
pub(crate) fn install_kick() -> Result<()> {
    // SAFETY: the handler does nothing, so it may run anywhere. Zeros are a valid sigaction.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut())
    };
    if done == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error()).context("sigaction")
    }
}

impl Vcpu {
    /// Starts the thread, which waits for [`Vcpu::start`].
    pub(crate) fn spawn(
        index: usize,
        mut fd: VcpuFd,
        msrs: Msrs,
        devices: Arc<Devices>,
        news: Sender<News>,
    ) -> Result<Self> {
        let byte = &raw mut fd.get_kvm_run().immediate_exit;
        // SAFETY: the run page stays mapped while the fd lives: to the end of the process, since
        // the thread never drops it. Every access to the byte is atomic.
        let immediate_exit = unsafe { AtomicU8::from_ptr(byte) };
        let (start, started) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let mut runner = Runner {
            index,
            fd,
            msrs,
            stop: Arc::clone(&stop),
            devices,
        };
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                let last = runner.serve(&started, &news).unwrap_or_else(News::Failed);
                // If the control thread is gone, so is the process.
                let _ = news.send(last);
                loop {
                    thread::park();
                }
            })
            .context("start a vCPU thread")?;
        Ok(Self {
            start,
            stop,
            immediate_exit,
            thread,
        })
    }

    /// Lets it run, from a state or from what was set up before.
    pub(crate) fn start(&self, state: Option<Box<VcpuState>>) -> Result<()> {
        self.start
            .send(state)
            .map_err(|_| anyhow!("a vCPU thread has ended"))
    }

    /// Asks it to stop.
    pub(crate) fn kick(&self) -> Result<()> {
        self.stop.store(true, SeqCst);
        self.immediate_exit.store(1, SeqCst);
        // SAFETY: the thread has not been joined.
        match unsafe { libc::pthread_kill(self.thread.as_pthread_t(), libc::SIGUSR1) } {
            0 => Ok(()),
            error => Err(std::io::Error::from_raw_os_error(error)).context("kick a vCPU"),
        }
    }
}

impl Runner {
    fn serve(
        &mut self,
        started: &Receiver<Option<Box<VcpuState>>>,
        news: &Sender<News>,
    ) -> Result<News> {
        if let Some(state) = started.recv().context("wait for the start")? {
            state.set(&self.fd, &mut self.msrs)?;
        }
        news.send(News::Running(now_ns()))
            .context("tell of the start")?;
        self.run_until_kicked()?;
        Ok(News::Stopped(
            self.index,
            VcpuState::get(&self.fd, &mut self.msrs)?,
        ))
    }

    /// Runs until a kick. With `immediate_exit` set, KVM_RUN first completes the I/O it had left
    /// to us and then gives EINTR: a vCPU never stops half-way through an instruction.
    fn run_until_kicked(&mut self) -> Result<()> {
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => self.devices.port_out(port, data),
                Ok(VcpuExit::IoIn(port, data)) => self.devices.port_in(port, data),
                Ok(VcpuExit::MmioRead(address, data)) => self.devices.mmio_read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.devices.mmio_write(address, data),
                Ok(VcpuExit::Intr) => {}
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    let regs = self.fd.get_regs().context("KVM_GET_REGS")?;
                    bail!("vCPU {}: exit {exit} at {:#x}", self.index, regs.rip);
                }
                Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
                    if self.stop.load(Relaxed) && error.errno() == libc::EINTR {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error).context(format!("KVM_RUN of vCPU {}", self.index)),
            }
        }
    }
}
