//! Directories in one redb file that several processes share.
//!
//! redb lets either one process write or several read. So the file is opened for each group of operations and closed right
//! after it. A process that finds it locked tries again for ten seconds.
//!
//! redb never accepts a file whose creation was interrupted, so a new file gets its name when it is complete.
//!
//! Each module uses only the ones after it: `gc`, `service`, `database`.

mod database;
mod gc;
mod service;
#[cfg(test)]
mod tests;

pub(crate) use gc::Reachable;
pub use service::RedbDirectoryService;
