//! The end of a command, with its output.

use std::{fs, os::unix::process::ExitStatusExt, path::PathBuf, process::ExitStatus, time::Duration};

use serde_json::Value;

use crate::{castore::NodeText, program::MEND};

/// The expected outputs of a command.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    /// Names of the outputs, in the order of the request.
    pub(crate) outputs: Vec<String>,
    /// The directory to which they are exported.
    pub(crate) exported_to: Option<PathBuf>,
}

/// A command that has ended.
#[derive(Debug)]
pub struct Outcome {
    status: ExitStatus,
    /// Its duration.
    pub took: Duration,
    /// Peak resident memory of the `cofferdam` process itself, in bytes.
    pub peak_bytes: u64,
    /// Its stdout.
    pub stdout: String,
    /// Its stderr, the build's own output included.
    pub stderr: String,
    expected: Expected,
}

/// One output of a successful build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its node.
    pub node: NodeText,
    /// Indexes of the needles found in it.
    pub needles: Vec<u64>,
}

impl Outcome {
    pub(crate) fn new(
        status: ExitStatus,
        took: Duration,
        peak_bytes: u64,
        stdout: Vec<u8>,
        stderr: &[u8],
        expected: Expected,
    ) -> Self {
        let stdout = String::from_utf8(stdout).expect("results are UTF-8");
        // A build's output may be any bytes.
        let stderr = String::from_utf8_lossy(stderr).into_owned();
        Self { status, took, peak_bytes, stdout, stderr, expected }
    }

    /// Asserts exit code 0.
    #[track_caller]
    pub fn succeeds(self) -> Self {
        assert!(self.status.success(), "it did not succeed: {self}");
        self
    }

    /// Asserts exit code 1: the build failed with this reason.
    #[track_caller]
    pub fn build_fails(self, reason: &str) -> Self {
        self.fails_as(1, "build_failed", reason)
    }

    /// Asserts exit code 2: the request is wrong, with this reason.
    #[track_caller]
    pub fn is_refused(self, reason: &str) -> Self {
        self.fails_as(2, "request_wrong", reason)
    }

    /// Asserts exit code 3: the executor failed with this reason.
    #[track_caller]
    pub fn executor_fails(self, reason: &str) -> Self {
        self.fails_as(3, "executor_failed", reason)
    }

    #[track_caller]
    fn fails_as(self, code: i32, kind: &str, reason: &str) -> Self {
        let this = self.exits_with(code);
        let json = this.json();
        assert_eq!(json["kind"], kind, "{this}");
        assert_eq!(json["reason"], reason, "{this}");
        let message = json["message"].as_str().unwrap_or_default();
        assert!(this.stderr.contains("error: "), "no error on stderr: {this}");
        assert!(!message.is_empty(), "no message in the JSON: {this}");
        this
    }

    /// Asserts this exit code.
    #[track_caller]
    pub fn exits_with(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "expected exit code {code}: {self}");
        self
    }

    /// Asserts that its stderr contains `text`.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "it does not say {text:?}: {self}");
        self
    }

    /// The signal that ended it, if one did.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// Its stdout as JSON, without the line with the id of a daemon's build.
    #[track_caller]
    pub fn json(&self) -> Value {
        let text = match self.build_id() {
            Some(_) => self.stdout.split_once('\n').map_or("", |(_, rest)| rest),
            None => &self.stdout,
        };
        serde_json::from_str(text).unwrap_or_else(|error| panic!("stdout is not JSON ({error}): {self}"))
    }

    /// The daemon's id of the build, from the first line of its stdout.
    pub fn build_id(&self) -> Option<String> {
        let first: Value = serde_json::from_str(self.stdout.lines().next()?).ok()?;
        first["build"].as_str().map(str::to_owned)
    }

    /// The outputs, from the `BuildResponse` on stdout.
    #[track_caller]
    pub fn outputs(&self) -> Vec<Output> {
        let json = self.json();
        let list = json["outputs"].as_array().cloned().unwrap_or_default();
        list.iter()
            .map(|output| Output {
                node: NodeText::from_json(&output["output"])
                    .unwrap_or_else(|| panic!("{output} holds no node: {self}")),
                needles: integers(&output["needles"]),
            })
            .collect()
    }

    /// The only output.
    #[track_caller]
    pub fn output(&self) -> Output {
        let outputs = self.outputs();
        let [output] = &outputs[..] else { panic!("there is not one output: {self}") };
        output.clone()
    }

    /// The path of an exported output.
    #[track_caller]
    pub fn exported(&self, output: &str) -> PathBuf {
        assert!(self.expected.outputs.iter().any(|name| name == output), "{output:?} was not requested");
        let directory = self.expected.exported_to.as_ref().expect("the build exports its outputs");
        directory.join(output)
    }

    /// The contents of an output, as text.
    #[track_caller]
    pub fn read(&self, output: &str) -> String {
        String::from_utf8(self.read_bytes(output)).unwrap_or_else(|error| panic!("{output:?} holds no text: {error}"))
    }

    /// The contents of an output, as bytes.
    #[track_caller]
    pub fn read_bytes(&self, output: &str) -> Vec<u8> {
        let path = self.exported(output);
        fs::read(&path).unwrap_or_else(|error| panic!("can't read {}: {error}: {self}", path.display()))
    }
}

/// Integers of 64 bits are strings in ProtoJSON.
fn integers(list: &Value) -> Vec<u64> {
    let integer = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
    list.as_array().map(|list| list.iter().filter_map(integer).collect()).unwrap_or_default()
}

/// Shows everything about the command, for failed assertions.
impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} after {:.1} s", self.status, self.took.as_secs_f64())?;
        write!(f, "\n--- stdout ---\n{}\n--- stderr ---\n{}\n---", self.stdout, self.stderr)?;
        let lacks_vmm = self.stderr.contains("no virtual machine can run here");
        if lacks_vmm { write!(f, "\n{MEND}") } else { Ok(()) }
    }
}
