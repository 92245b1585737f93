//! A tree: one output as a stream of [events](Event), in the order of a depth-first walk.
//!
//! ```text
//!   node      = Directory  entry*  End
//!             | File       Data*   End
//!             | Symlink
//!   entry     = a node whose name is not empty, and bytewise greater than the name of the entry before it
//! ```
//!
//! The root's name is empty. [`Check`] enforces the grammar and the limits.
//!
//! ```
//! use cofferdam_protocol::tree::{Check, Event, Limits};
//!
//! # fn main() -> Result<(), cofferdam_protocol::tree::TreeError> {
//! let mut check = Check::new(Limits { entries: 1000, bytes: 1 << 20 });
//! for event in [
//!     Event::Directory { name: b"" },
//!     Event::File { name: b"hello", executable: true },
//!     Event::Data(b"#!/bin/sh\n"),
//!     Event::Data(b"echo hello\n"),
//!     Event::End,
//!     Event::Symlink { name: b"hi", target: b"hello" },
//! ] {
//!     check.admit(&event)?;
//! }
//! assert!(!check.is_complete());
//! check.admit(&Event::End)?;
//! assert!(check.is_complete());
//! # Ok(())
//! # }
//! ```

use serde::{Deserialize, Serialize};

/// Longest name of an entry, in bytes (`NAME_MAX` of Linux).
const MAX_NAME_BYTES: usize = 255;

/// Longest target of a symlink, in bytes (`PATH_MAX` of Linux, without its NUL).
pub const MAX_TARGET_BYTES: usize = 4095;

/// Limit on the depth of directories, the root included.
pub const MAX_DEPTH: usize = 512;

/// Limit on the bytes of all names and symlink targets in all outputs together.
///
/// A receiver has these in memory, unlike contents, and several times. A million entries with names of 60 bytes stay
/// below the limit.
pub const MAX_METADATA_BYTES: u64 = 64 << 20;

/// One event of the stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event<'a> {
    /// A directory begins.
    Directory {
        /// Empty for the root.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
    },
    /// A regular file begins.
    File {
        /// Empty for the root.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
        /// The owner's execute bit.
        executable: bool,
    },
    /// The next bytes of the file's contents; not empty.
    Data(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// The end of the open file, or of the innermost open directory.
    End,
    /// A symbolic link. It has no `End`.
    Symlink {
        /// Empty for the root.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
        /// Not empty, and without a NUL byte.
        #[serde(borrow, with = "serde_bytes")]
        target: &'a [u8],
    },
}

/// Limits on all outputs of one build together.
///
/// ```
/// use cofferdam_protocol::tree::{Check, Event, Limits, TreeError};
///
/// # fn main() -> Result<(), TreeError> {
/// let mut check = Check::new(Limits { entries: 2, bytes: 10 });
/// check.admit(&Event::File { name: b"", executable: false })?;
/// check.admit(&Event::Data(b"12345678"))?;
/// check.admit(&Event::End)?;
///
/// // The second output counts against the same limits.
/// check.next_tree()?;
/// check.admit(&Event::File { name: b"", executable: false })?;
/// assert_eq!(check.admit(&Event::Data(b"90ab")), Err(TreeError::TooManyBytes { limit: 10 }));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Limit on the number of entries, roots included.
    pub entries: u64,
    /// Limit on the bytes of file contents.
    pub bytes: u64,
}

/// A rule that the sender broke.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// An event that the grammar does not allow here.
    #[error("{event} came {place}")]
    OutOfPlace {
        /// The event's name.
        event: &'static str,
        /// The state of the stream.
        place: &'static str,
    },
    /// A name that castore does not allow.
    #[error("entry name {name:?} {rule}")]
    Name {
        /// The name, escaped.
        name: String,
        /// The broken rule.
        rule: &'static str,
    },
    /// Names that are not in ascending order.
    #[error("entry name {name:?} is not greater than {previous:?}, which came before it")]
    Order {
        /// The name, escaped.
        name: String,
        /// The name before it, escaped.
        previous: String,
    },
    /// A symlink target that castore does not allow.
    #[error("symlink target {target:?} {rule}")]
    Target {
        /// The target, escaped.
        target: String,
        /// The broken rule.
        rule: &'static str,
    },
    /// [`MAX_DEPTH`] is exceeded.
    #[error("directories are nested deeper than {MAX_DEPTH}")]
    TooDeep,
    /// [`Limits::entries`] is exceeded.
    #[error("the outputs have more than {limit} entries")]
    TooManyEntries {
        /// The limit.
        limit: u64,
    },
    /// [`MAX_METADATA_BYTES`] is exceeded.
    #[error("the outputs have more than {MAX_METADATA_BYTES} bytes of names and symlink targets")]
    TooMuchMetadata,
    /// [`Limits::bytes`] is exceeded.
    #[error("the outputs have more than {limit} bytes of file contents")]
    TooManyBytes {
        /// The limit.
        limit: u64,
    },
}

/// Enforces the grammar and the limits on all trees of one sender. Does no I/O.
///
/// ```
/// use cofferdam_protocol::tree::{Check, Event, Limits};
///
/// # fn main() -> Result<(), cofferdam_protocol::tree::TreeError> {
/// let mut check = Check::new(Limits { entries: 1000, bytes: 1 << 20 });
/// check.admit(&Event::Directory { name: b"" })?;
/// check.admit(&Event::Symlink { name: b"b", target: b"/" })?;
///
/// let error = check.admit(&Event::Symlink { name: b"a", target: b"/" }).unwrap_err();
/// assert_eq!(error.to_string(), r#"entry name "a" is not greater than "b", which came before it"#);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Check {
    limits: Limits,
    entries: u64,
    bytes: u64,
    metadata_bytes: u64,
    /// The last name in each open directory, outermost first.
    open: Vec<Vec<u8>>,
    in_file: bool,
    root_seen: bool,
}

impl Check {
    /// A check for the first tree.
    pub fn new(limits: Limits) -> Self {
        Self { limits, entries: 0, bytes: 0, metadata_bytes: 0, open: Vec::new(), in_file: false, root_seen: false }
    }

    /// Starts the next tree. Totals carry over.
    ///
    /// # Errors
    ///
    /// The last tree is incomplete.
    pub fn next_tree(&mut self) -> Result<(), TreeError> {
        if self.root_seen && !self.is_complete() {
            return Err(TreeError::OutOfPlace { event: "another output", place: "inside an unfinished tree" });
        }
        self.root_seen = false;
        Ok(())
    }

    /// Whether the tree has a root, and no file or directory is open.
    pub fn is_complete(&self) -> bool {
        self.root_seen && !self.in_file && self.open.is_empty()
    }

    /// Checks the next event.
    ///
    /// # Errors
    ///
    /// The event breaks a rule. The check must not be used any more.
    pub fn admit(&mut self, event: &Event<'_>) -> Result<(), TreeError> {
        match *event {
            Event::Data(bytes) => self.admit_data(bytes),
            Event::End => self.admit_end(),
            Event::Directory { name } => {
                self.admit_entry("a directory", name)?;
                if self.open.len() >= MAX_DEPTH {
                    return Err(TreeError::TooDeep);
                }
                self.open.push(Vec::new());
                Ok(())
            }
            Event::File { name, .. } => {
                self.admit_entry("a file", name)?;
                self.in_file = true;
                Ok(())
            }
            Event::Symlink { name, target } => {
                self.admit_entry("a symlink", name)?;
                check_target(target)?;
                self.admit_metadata(target)
            }
        }
    }

    fn admit_data(&mut self, bytes: &[u8]) -> Result<(), TreeError> {
        if !self.in_file {
            return Err(TreeError::OutOfPlace { event: "file contents", place: "outside of a file" });
        }
        if bytes.is_empty() {
            return Err(TreeError::OutOfPlace { event: "an empty piece of file contents", place: "inside a file" });
        }
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
        if self.bytes > self.limits.bytes {
            return Err(TreeError::TooManyBytes { limit: self.limits.bytes });
        }
        Ok(())
    }

    fn admit_end(&mut self) -> Result<(), TreeError> {
        if self.in_file {
            self.in_file = false;
            return Ok(());
        }
        match self.open.pop() {
            Some(_) => Ok(()),
            None => Err(TreeError::OutOfPlace { event: "an end", place: "with nothing open" }),
        }
    }

    fn admit_entry(&mut self, event: &'static str, name: &[u8]) -> Result<(), TreeError> {
        if self.in_file {
            return Err(TreeError::OutOfPlace { event, place: "inside a file" });
        }
        match self.open.last_mut() {
            None if self.root_seen => {
                return Err(TreeError::OutOfPlace { event, place: "after the tree's end" });
            }
            None if name.is_empty() => self.root_seen = true,
            None => return Err(TreeError::Name { name: escape(name), rule: "belongs to a root and must be empty" }),
            Some(previous) => {
                check_name(name)?;
                if name <= previous.as_slice() {
                    return Err(TreeError::Order { name: escape(name), previous: escape(previous) });
                }
                previous.clear();
                previous.extend_from_slice(name);
            }
        }
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(TreeError::TooManyEntries { limit: self.limits.entries });
        }
        self.admit_metadata(name)
    }

    fn admit_metadata(&mut self, bytes: &[u8]) -> Result<(), TreeError> {
        self.metadata_bytes += bytes.len() as u64;
        if self.metadata_bytes > MAX_METADATA_BYTES {
            return Err(TreeError::TooMuchMetadata);
        }
        Ok(())
    }
}

fn check_name(name: &[u8]) -> Result<(), TreeError> {
    let rule = match name {
        b"" => "is empty",
        b"." | b".." => "is reserved",
        _ if name.len() > MAX_NAME_BYTES => "is longer than 255 bytes",
        _ if name.contains(&b'/') => "holds a slash",
        _ if name.contains(&0) => "holds a NUL",
        _ => return Ok(()),
    };
    Err(TreeError::Name { name: escape(name), rule })
}

fn check_target(target: &[u8]) -> Result<(), TreeError> {
    let rule = match target {
        b"" => "is empty",
        _ if target.len() > MAX_TARGET_BYTES => "is longer than 4095 bytes",
        _ if target.contains(&0) => "holds a NUL",
        _ => return Ok(()),
    };
    Err(TreeError::Target { target: escape(target), rule })
}

/// Escapes at most the first 64 bytes, so that every error is one short line.
fn escape(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(64)].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { entries: 4, bytes: 8 };
    const ROOT: Event<'_> = Event::Directory { name: b"" };

    fn file(name: &[u8]) -> Event<'_> {
        Event::File { name, executable: false }
    }

    fn refused(events: &[Event<'_>]) -> TreeError {
        let mut check = Check::new(LIMITS);
        let (last, before) = events.split_last().unwrap();
        for event in before {
            check.admit(event).unwrap();
        }
        check.admit(last).unwrap_err()
    }

    #[test]
    fn a_well_formed_tree_is_complete_only_at_its_end() {
        let mut check = Check::new(LIMITS);
        let events =
            [ROOT, file(b"a"), Event::Data(b"12345678"), Event::End, Event::Symlink { name: b"b", target: b"/" }];
        for event in &events {
            check.admit(event).unwrap();
            assert!(!check.is_complete());
        }
        check.admit(&Event::End).unwrap();
        assert!(check.is_complete());
        assert_eq!((check.entries, check.bytes), (3, 8));
    }

    #[test]
    fn names_follow_the_rules_of_castore() {
        let long = [b'a'; MAX_NAME_BYTES + 1];
        for (name, rule) in [
            (b"".as_slice(), "is empty"),
            (b".", "is reserved"),
            (b"..", "is reserved"),
            (b"a/b", "holds a slash"),
            (b"a\0", "holds a NUL"),
            (&long, "is longer than 255 bytes"),
        ] {
            assert!(matches!(refused(&[ROOT, file(name)]), TreeError::Name { rule: found, .. } if found == rule));
        }
        let mut check = Check::new(LIMITS);
        check.admit(&ROOT).unwrap();
        check.admit(&file(&long[1..])).unwrap();
    }

    #[test]
    fn a_refused_name_is_shown_on_one_short_line() {
        assert_eq!(refused(&[ROOT, file(b"a\n/")]).to_string(), r#"entry name "a\\n/" holds a slash"#);
        assert!(refused(&[ROOT, file(&[b'/'; 10_000])]).to_string().len() < 200);
    }

    #[test]
    fn a_root_has_no_name_and_no_siblings() {
        assert!(matches!(refused(&[file(b"out")]), TreeError::Name { .. }));
        assert!(matches!(refused(&[ROOT, Event::End, ROOT]), TreeError::OutOfPlace { .. }));
    }

    #[test]
    fn repeated_and_descending_names_are_refused() {
        for second in [b"b".as_slice(), b"a"] {
            let events =
                [ROOT, Event::Symlink { name: b"b", target: b"t" }, Event::Symlink { name: second, target: b"t" }];
            assert!(matches!(refused(&events), TreeError::Order { .. }));
        }
    }

    #[test]
    fn targets_follow_the_rules_of_castore() {
        let long = [b'a'; MAX_TARGET_BYTES + 1];
        for target in [b"".as_slice(), b"a\0b", &long] {
            assert!(matches!(refused(&[Event::Symlink { name: b"", target }]), TreeError::Target { .. }));
        }
    }

    #[test]
    fn events_out_of_place_are_refused() {
        for events in [
            vec![Event::End],
            vec![Event::Data(b"x")],
            vec![ROOT, Event::Data(b"x")],
            vec![file(b""), Event::Data(b"")],
            vec![file(b""), file(b"")],
            vec![file(b""), Event::End, Event::End],
        ] {
            assert!(matches!(refused(&events), TreeError::OutOfPlace { .. }), "{events:?}");
        }
    }

    #[test]
    fn depth_entries_and_bytes_are_limited() {
        let many = Limits { entries: u64::MAX, bytes: u64::MAX };
        let mut check = Check::new(many);
        check.admit(&ROOT).unwrap();
        for _ in 1..MAX_DEPTH {
            check.admit(&Event::Directory { name: b"d" }).unwrap();
        }
        assert_eq!(check.admit(&Event::Directory { name: b"d" }), Err(TreeError::TooDeep));

        let links: Vec<_> = [b"a", b"b", b"c", b"d"].map(|name| Event::Symlink { name, target: b"t" }).into();
        let events = [vec![ROOT], links].concat();
        assert_eq!(refused(&events), TreeError::TooManyEntries { limit: 4 });

        let events = [file(b""), Event::Data(b"12345678"), Event::Data(b"9")];
        assert_eq!(refused(&events), TreeError::TooManyBytes { limit: 8 });
    }

    #[test]
    fn names_and_targets_have_one_limit_together() {
        let target = [b't'; MAX_TARGET_BYTES];
        let mut check = Check::new(Limits { entries: u64::MAX, bytes: u64::MAX });
        check.admit(&ROOT).unwrap();
        let link_bytes = target.len() as u64 + 10;
        for number in 0..MAX_METADATA_BYTES / link_bytes {
            let name = format!("{number:010}");
            check.admit(&Event::Symlink { name: name.as_bytes(), target: &target }).unwrap();
        }
        let rest = vec![b'x'; (MAX_METADATA_BYTES % link_bytes) as usize];
        check.admit(&Event::Symlink { name: b"x", target: &rest[1..] }).unwrap();
        assert_eq!(check.admit(&file(b"y")), Err(TreeError::TooMuchMetadata));
    }

    #[test]
    fn totals_carry_over_from_tree_to_tree() {
        let mut check = Check::new(LIMITS);
        check.admit(&file(b"")).unwrap();
        check.next_tree().unwrap_err();
        check.admit(&Event::Data(b"12345678")).unwrap();
        check.admit(&Event::End).unwrap();
        check.next_tree().unwrap();
        check.admit(&file(b"")).unwrap();
        assert_eq!(check.admit(&Event::Data(b"9")), Err(TreeError::TooManyBytes { limit: 8 }));
    }
}
