//! Versions, operations and messages of the worker protocol, and of the serve protocol.

use std::io::{self, Write};

use crate::{Realisation, wire::Writer};

/// A client's first word.
pub const CLIENT_MAGIC: u64 = 0x6e69_7863;

/// A server's first word.
pub const SERVER_MAGIC: u64 = 0x6478_696f;

/// A version of the protocol, with the major number in the high byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u64);

impl Version {
    /// The oldest that is spoken: Nix 2.3.
    pub const OLDEST: Self = Self::minor(21);
    /// The newest that is spoken: Nix 2.24 and later.
    pub const NEWEST: Self = Self::minor(38);

    /// 1 and this minor number.
    pub const fn minor(minor: u8) -> Self {
        Self(1 << 8 | minor as u64)
    }

    /// What a server speaks with a client of this version.
    ///
    /// # Errors
    ///
    /// The client is too old, or of another major number.
    pub fn with_client(client: u64) -> Result<Self, String> {
        let version = Self(client).min(Self::NEWEST);
        if client >> 8 != 1 || version < Self::OLDEST {
            let (major, minor) = (client >> 8, client & 0xff);
            return Err(format!("the protocol's version must be 1.21 or newer, not {major}.{minor}"));
        }
        Ok(version)
    }
}

/// A client's first word in the serve protocol.
pub const SERVE_CLIENT_MAGIC: u64 = 0x390c_9deb;

/// A server's first word in it.
pub const SERVE_SERVER_MAGIC: u64 = 0x5452_eecb;

/// A version of the serve protocol, with the major number in the high byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServeVersion(pub u64);

impl ServeVersion {
    /// The newest that is spoken.
    pub const NEWEST: Self = Self::minor(7);

    /// 2 and this minor number.
    pub const fn minor(minor: u8) -> Self {
        Self(2 << 8 | minor as u64)
    }

    /// What a server speaks with a client of this version.
    ///
    /// # Errors
    ///
    /// The client has another major number.
    pub fn with_client(client: u64) -> Result<Self, String> {
        match client >> 8 {
            2 => Ok(Self(client).min(Self::NEWEST)),
            major => Err(format!("the serve protocol's version must be 2, not {major}")),
        }
    }

    /// Integers that a client sends with a build: the times that it may be silent and take, the size of its log, how often it is
    /// repeated, whether that must give the same, and whether a failed one is kept.
    pub fn build_settings(self) -> usize {
        [(0, 2), (2, 1), (3, 2), (7, 1)]
            .into_iter()
            .filter_map(|(since, count)| (self >= Self::minor(since)).then_some(count))
            .sum()
    }
}

/// An operation, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
#[expect(missing_docs, reason = "they are called as in Nix")]
pub enum Operation {
    IsValidPath = 1,
    AddToStore = 7,
    AddTextToStore = 8,
    BuildPaths = 9,
    EnsurePath = 10,
    AddTempRoot = 11,
    SetOptions = 19,
    CollectGarbage = 20,
    QueryPathInfo = 26,
    QueryPathFromHashPart = 29,
    QueryValidPaths = 31,
    QuerySubstitutablePaths = 32,
    BuildDerivation = 36,
    AddSignatures = 37,
    NarFromPath = 38,
    AddToStoreNar = 39,
    QueryMissing = 40,
    QueryDerivationOutputMap = 41,
    RegisterDrvOutput = 42,
    QueryRealisation = 43,
    AddMultipleToStore = 44,
    BuildPathsWithResults = 46,
}

impl Operation {
    const ALL: [Self; 22] = [
        Self::IsValidPath,
        Self::AddToStore,
        Self::AddTextToStore,
        Self::BuildPaths,
        Self::EnsurePath,
        Self::AddTempRoot,
        Self::SetOptions,
        Self::CollectGarbage,
        Self::QueryPathInfo,
        Self::QueryPathFromHashPart,
        Self::QueryValidPaths,
        Self::QuerySubstitutablePaths,
        Self::BuildDerivation,
        Self::AddSignatures,
        Self::NarFromPath,
        Self::AddToStoreNar,
        Self::QueryMissing,
        Self::QueryDerivationOutputMap,
        Self::RegisterDrvOutput,
        Self::QueryRealisation,
        Self::AddMultipleToStore,
        Self::BuildPathsWithResults,
    ];

    /// The operation with this number, if it is known.
    pub fn numbered(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| *operation as u64 == number)
    }
}

/// How a build ended, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Status {
    /// It was built.
    Built = 0,
    /// Its outputs were there.
    AlreadyValid = 2,
    /// Its builder failed.
    PermanentFailure = 3,
    /// Its outputs break a rule of the derivation.
    OutputRejected = 5,
    /// The host failed; it may succeed later.
    TransientFailure = 6,
    /// It took too long.
    TimedOut = 8,
    /// It can't be built here, for a reason that its message has.
    MiscFailure = 9,
    /// A build that it depends on failed.
    DependencyFailed = 10,
    /// It wrote more than is kept.
    LogLimitExceeded = 11,
}

/// The end of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildResult {
    /// How it ended.
    pub status: Status,
    /// Why; empty after success.
    pub message: String,
    /// Seconds since 1970.
    pub started: u64,
    /// Seconds since 1970.
    pub stopped: u64,
    /// The time of the processor in user space and in the kernel, in microseconds.
    pub cpu_us: Option<(u64, u64)>,
    /// What outputs became, for clients that can't know it beforehand.
    pub outputs: Vec<Realisation>,
}

impl BuildResult {
    /// Whether the outputs are there.
    pub fn is_success(&self) -> bool {
        matches!(self.status, Status::Built | Status::AlreadyValid)
    }

    /// Writes it for a client of this version.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn write<W: Write>(&self, writer: &mut Writer<W>, version: Version) -> io::Result<()> {
        writer.integer(self.status as u64)?;
        writer.text(&self.message)?;
        if version >= Version::minor(29) {
            self.write_times(writer)?;
        }
        if version >= Version::minor(37) {
            for time in [self.cpu_us.map(|(user, _)| user), self.cpu_us.map(|(_, system)| system)] {
                writer.integer(time.is_some())?;
                if let Some(time) = time {
                    writer.integer(time)?;
                }
            }
        }
        if version >= Version::minor(28) {
            self.write_outputs(writer)?;
        }
        Ok(())
    }

    /// Writes it for a client of the serve protocol.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn write_served<W: Write>(&self, writer: &mut Writer<W>, version: ServeVersion) -> io::Result<()> {
        writer.integer(self.status as u64)?;
        writer.text(&self.message)?;
        if version >= ServeVersion::minor(3) {
            self.write_times(writer)?;
        }
        if version >= ServeVersion::minor(6) {
            self.write_outputs(writer)?;
        }
        Ok(())
    }

    fn write_times<W: Write>(&self, writer: &mut Writer<W>) -> io::Result<()> {
        let (times_built, is_non_deterministic) = (u64::from(self.status == Status::Built), false);
        writer.integer(times_built)?;
        writer.integer(is_non_deterministic)?;
        writer.integer(self.started)?;
        writer.integer(self.stopped)
    }

    fn write_outputs<W: Write>(&self, writer: &mut Writer<W>) -> io::Result<()> {
        writer.integer(self.outputs.len() as u64)?;
        for realisation in &self.outputs {
            writer.text(&realisation.id)?;
            writer.text(realisation.to_json())?;
        }
        Ok(())
    }
}

/// The kind of an activity that is a build.
const BUILD_ACTIVITY: u64 = 105;

/// The kind of a result that is a line of a build's log.
const LOG_LINE: u64 = 101;

/// What level a message has.
const ERROR: u64 = 0;
const TALKATIVE: u64 = 3;

/// What a server says before the answer of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message<'a> {
    /// A line for the user.
    Next(&'a str),
    /// The client shall send this many bytes at most.
    Read(u64),
    /// A build begins.
    StartBuild {
        /// Its number in the connection.
        activity: u64,
        /// For the user.
        text: &'a str,
        /// Its derivation's path.
        derivation: &'a str,
    },
    /// A line of a build's log.
    LogLine {
        /// The build.
        activity: u64,
        /// The line, without its end.
        line: &'a [u8],
    },
    /// A build ends.
    StopBuild {
        /// The build.
        activity: u64,
    },
    /// The operation failed.
    Error(&'a str),
    /// The answer follows.
    Last,
}

impl Message<'_> {
    /// Writes it for a client of this version.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn write<W: Write>(&self, writer: &mut Writer<W>, version: Version) -> io::Result<()> {
        match *self {
            Self::Next(text) => {
                writer.integer(0x6f6c_6d67_u64)?;
                writer.text(text)
            }
            Self::Read(bytes) => {
                writer.integer(0x6461_7461_u64)?;
                writer.integer(bytes)
            }
            Self::StartBuild { activity, text, derivation } => {
                for word in [0x5354_5254, activity, TALKATIVE, BUILD_ACTIVITY] {
                    writer.integer(word)?;
                }
                writer.text(text)?;
                // The derivation, the builder's host, and a round of how many.
                writer.integer(4_u64)?;
                for string in [derivation, ""] {
                    writer.integer(1_u64)?;
                    writer.text(string)?;
                }
                for number in [0_u64, 1, 0, 1] {
                    writer.integer(number)?;
                }
                let parent = 0_u64;
                writer.integer(parent)
            }
            Self::LogLine { activity, line } => {
                for word in [0x5253_4c54, activity, LOG_LINE, 1, 1] {
                    writer.integer(word)?;
                }
                writer.string(line)
            }
            Self::StopBuild { activity } => {
                writer.integer(0x5354_4f50_u64)?;
                writer.integer(activity)
            }
            Self::Error(text) => {
                writer.integer(0x6378_7470_u64)?;
                if version < Version::minor(26) {
                    writer.text(text)?;
                    let exit_status = 1_u64;
                    return writer.integer(exit_status);
                }
                writer.text("Error")?;
                writer.integer(ERROR)?;
                writer.text("Error")?;
                writer.text(text)?;
                let (has_position, traces) = (0_u64, 0_u64);
                writer.integer(has_position)?;
                writer.integer(traces)
            }
            Self::Last => writer.integer(0x616c_7473_u64),
        }
    }
}
