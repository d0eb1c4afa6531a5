//! What was started and is asked for later, by number, and no more of it than a bound.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use stillpoint_agent::protocol::{Code, Problem};

/// A table of jobs of one kind.
#[derive(Debug)]
pub(super) struct Jobs<T> {
    kind: &'static str,
    limit: usize,
    table: Mutex<Table<T>>,
}

#[derive(Debug)]
struct Table<T> {
    last: u64,
    /// None: reserved, and not started yet or never to be asked for.
    jobs: BTreeMap<u64, Option<T>>,
}

impl<T> Jobs<T> {
    /// An empty table of at most `limit`; `kind` names them in refusals.
    pub(super) fn new(kind: &'static str, limit: usize) -> Self {
        let jobs = BTreeMap::new();
        let table = Mutex::new(Table { last: 0, jobs });
        Self { kind, limit, table }
    }

    fn lock(&self) -> MutexGuard<'_, Table<T>> {
        // A table is whole between any two statements that hold the lock.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more, so that nothing is started that then has no room.
    pub(super) fn reserve(&self) -> Result<Reserved<'_, T>, Problem> {
        let mut table = self.lock();
        if table.jobs.len() >= self.limit {
            let (kind, limit) = (self.kind, self.limit);
            let text = format!("there are {limit} {kind} already: fetch what came of some first");
            let code = Code::TooMany;
            return Err(Problem { code, text });
        }
        table.last += 1;
        let id = table.last;
        table.jobs.insert(id, None);
        Ok(Reserved { jobs: self, id })
    }

    /// Takes a job out of the table.
    pub(super) fn remove(&self, id: u64) -> Result<T, Problem> {
        let mut table = self.lock();
        match table.jobs.remove(&id) {
            Some(Some(job)) => Ok(job),
            Some(None) => {
                table.jobs.insert(id, None);
                Err(no_such(id))
            }
            None => Err(no_such(id)),
        }
    }
}

impl<T: Clone> Jobs<T> {
    /// A job of the table.
    pub(super) fn get(&self, id: u64) -> Result<T, Problem> {
        let job = self.lock().jobs.get(&id).cloned();
        job.flatten().ok_or_else(|| no_such(id))
    }
}

fn no_such(id: u64) -> Problem {
    Problem {
        code: Code::NoSuchJob,
        text: format!("there is no job {id}, or its end was told already"),
    }
}

/// A place in the table; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Reserved<'a, T> {
    jobs: &'a Jobs<T>,
    id: u64,
}

impl<T> Reserved<'_, T> {
    /// Puts the job there, and tells its number.
    pub(super) fn fill(self, job: T) -> u64 {
        self.jobs.lock().jobs.insert(self.id, Some(job));
        self.id
    }
}

impl<T> Drop for Reserved<'_, T> {
    fn drop(&mut self) {
        let mut table = self.jobs.lock();
        if let Some(None) = table.jobs.get(&self.id) {
            table.jobs.remove(&self.id);
        }
    }
}
