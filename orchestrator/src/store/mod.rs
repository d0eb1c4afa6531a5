//! What the daemon must not forget: desired and observed state of every VM, releases, and every
//! swap with its report. SQLite, one file, one thread that owns the connection.
//!
//! Before: nothing else has the file open; the daemon takes it exclusively. After every call that
//! returned `Ok` the change is on disk. A file that is locked, damaged or not ours is refused at
//! the start and left as it is. Must never: be written while a guest stands still.

mod audit;
#[cfg(feature = "fault-injection")]
pub mod disk;
mod epoch;
mod figures;
mod host_swaps;
mod journal;
mod open;
mod pauses;
mod releases;
mod rows;
pub mod shared;
mod swaps;
mod vms;

use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::model::{Code, Problem};

pub use audit::{Asking, Came};
pub use host_swaps::Busy;
pub use open::OpenError;
pub use vms::Observed;

/// Why the store could not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No room for the change; nothing was changed.
    #[error("no space left for the store at {0}; free some and ask again (nothing was changed)")]
    Full(PathBuf),
    /// SQLite failed.
    #[error("the store at {path} failed: {source}")]
    Sql {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The thread that owns the connection is gone: the daemon is ending.
    #[error("the store is closed")]
    Closed,
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        let code = match error {
            StoreError::Full(_) => Code::StoreFull,
            StoreError::Sql { .. } | StoreError::Closed => Code::StoreFailed,
        };
        Self::new(code, error.to_string())
    }
}

type Work = Box<dyn FnOnce(&mut Connection) + Send>;

/// What the store's thread is asked for.
enum Job {
    /// Work on the connection.
    Do(Work),
    /// Close it, and say so.
    Close(oneshot::Sender<()>),
}

/// The store. Clones share one thread.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
    jobs: mpsc::Sender<Job>,
}

impl Store {
    /// Opens or creates the file and starts the thread that owns it.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let mut connection = open::open(path)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || {
                while let Ok(job) = queue.recv() {
                    match job {
                        Job::Do(work) => work(&mut connection),
                        Job::Close(done) => {
                            // Puts the log back into the file; what fails here is done again
                            // at the next start.
                            drop(connection);
                            let _ = done.send(());
                            return;
                        }
                    }
                }
            })
            .map_err(|source| OpenError::Io {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            path: path.to_owned(),
            jobs,
        })
    }

    /// Closes the file after all that was asked for before. Later calls give
    /// [`StoreError::Closed`].
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.jobs.send(Job::Close(done)).is_ok() {
            // An error is a thread that is gone, and its connection with it.
            let _ = closed.await;
        }
    }

    /// Runs `work` in one transaction on the store's thread.
    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&rusqlite::Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let work: Work = Box::new(move |connection| {
            // Nobody waits any more: the change is made all the same.
            let _ = answer.send(transact(connection, work));
        });
        self.jobs
            .send(Job::Do(work))
            .map_err(|_| StoreError::Closed)?;
        let result = answered.await.map_err(|_| StoreError::Closed)?;
        result.map_err(|error| self.explain(error))
    }

    fn explain(&self, error: rusqlite::Error) -> StoreError {
        let path = self.path.clone();
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => StoreError::Full(path),
            _ => StoreError::Sql {
                path,
                source: error,
            },
        }
    }
}

fn transact<T>(
    connection: &mut Connection,
    work: impl FnOnce(&rusqlite::Transaction<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let transaction = connection.transaction()?;
    let result = work(&transaction)?;
    transaction.commit()?;
    Ok(result)
}

#[cfg(test)]
mod tests;
