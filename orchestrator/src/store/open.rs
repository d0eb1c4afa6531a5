//! Opening the file: looked at before it is touched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};
use rusqlite_migration::{M, Migrations};

/// `STPT`: tells our files from other programs'.
const APPLICATION_ID: i64 = 0x5354_5054;
/// A daemon that is just ending gets this long to let go.
const PATIENCE: Duration = Duration::from_secs(1);

const STEPS: &[M<'static>] = &[
    M::up(include_str!("schema-1.sql")),
    M::up(include_str!("schema-2.sql")),
    M::up(include_str!("schema-3.sql")),
    M::up(include_str!("schema-4.sql")),
    M::up(include_str!("schema-5.sql")),
    M::up(include_str!("schema-6.sql")),
    M::up(include_str!("schema-7.sql")),
    M::up(include_str!("schema-8.sql")),
    M::up(include_str!("schema-9.sql")),
    M::up(include_str!("schema-10.sql")),
];
const MIGRATIONS: Migrations<'static> = Migrations::from_slice(STEPS);

/// Why a store was not opened. The file is as it was.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Somebody else has it.
    #[error(
        "the store {0} is locked by another process (another stillpointd with the same state \
         directory, or a tool that has it open); end that process, or use another --state-dir"
    )]
    Locked(PathBuf),
    /// Not readable as a database.
    #[error(
        "the store {path} is damaged ({problem}); it was left untouched. Put a backup in its \
         place, or move it away to start with an empty store: guests that run go on, but the \
         daemon will not know them"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        problem: String,
    },
    /// A database of another program.
    #[error("{0} is a database, but not a store of Stillpoint; it was left untouched")]
    Foreign(PathBuf),
    /// Written by a later daemon.
    #[error("the store {path} cannot be brought to this version: {source}")]
    Migration {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rusqlite_migration::Error,
    },
    /// The file system refuses.
    #[error("cannot open the store {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// SQLite refuses.
    #[error("cannot open the store {path}: {source}")]
    Sql {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rusqlite::Error,
    },
}

/// Opens `path`, creating it if there is none.
pub(super) fn open(path: &Path) -> Result<Connection, OpenError> {
    create_private(path)?;
    let failed = |source| explain(path, source);
    let mut connection = connect(path).map_err(failed)?;
    connection.busy_timeout(PATIENCE).map_err(failed)?;
    // Exclusive: one daemon per state directory, and no shared-memory file that a full disk
    // could take from under us.
    connection
        .pragma_update(None, "locking_mode", "EXCLUSIVE")
        .map_err(failed)?;
    let new = inspect(&connection, path)?;
    // Only now is the file known to be ours and whole; all that follows may write.
    connection
        .pragma_update(None, "journal_mode", "WAL")
        .map_err(failed)?;
    connection
        .pragma_update(None, "synchronous", "FULL")
        .map_err(failed)?;
    if new {
        connection
            .pragma_update(None, "application_id", APPLICATION_ID)
            .map_err(failed)?;
    }
    MIGRATIONS
        .to_latest(&mut connection)
        .map_err(|source| match source {
            rusqlite_migration::Error::RusqliteError { err, .. } => explain(path, err),
            source => OpenError::Migration {
                path: path.to_owned(),
                source,
            },
        })?;
    // Takes the lock for good, also where nothing was to be migrated.
    connection
        .execute_batch("BEGIN IMMEDIATE; COMMIT")
        .map_err(failed)?;
    Ok(connection)
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    #[cfg(feature = "fault-injection")]
    return super::disk::connect(path, flags);
    #[cfg(not(feature = "fault-injection"))]
    Connection::open_with_flags(path, flags)
}

/// Whether the database is empty; an error if it is damaged or another program's.
fn inspect(connection: &Connection, path: &Path) -> Result<bool, OpenError> {
    let failed = |source| explain(path, source);
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(failed)?;
    let id: i64 = connection
        .query_row("PRAGMA application_id", [], |row| row.get(0))
        .map_err(failed)?;
    if tables > 0 && id != APPLICATION_ID {
        return Err(OpenError::Foreign(path.to_owned()));
    }
    let verdict: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(failed)?;
    if verdict != "ok" {
        return Err(OpenError::Corrupt {
            path: path.to_owned(),
            problem: verdict,
        });
    }
    Ok(tables == 0)
}

/// The file holds the VMs' secrets: only its owner may read it.
fn create_private(path: &Path) -> Result<(), OpenError> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map(drop)
        .map_err(|source| OpenError::Io {
            path: path.to_owned(),
            source,
        })
}

fn explain(path: &Path, source: rusqlite::Error) -> OpenError {
    let path = path.to_owned();
    match source.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => OpenError::Locked(path),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => OpenError::Corrupt {
            path,
            problem: source.to_string(),
        },
        _ => OpenError::Sql { path, source },
    }
}
