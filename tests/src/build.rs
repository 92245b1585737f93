//! The description of one build, as flags of `cofferdam run` or as a request for `cofferdam build`.

use std::{ffi::OsString, path::Path, process::Command};

use serde_json::Value;

use crate::{
    Cofferdam, Daemon, Outcome, Running,
    castore::NodeText,
    outcome::Expected,
    patience,
    slots::{self, Slots},
    terminal::Terminal,
    vmm,
};

/// Memory for a shell, and quick to start. A test that needs more sets its own.
const MEMORY: &str = "256M";

/// A build to be started.
#[derive(Debug)]
pub struct Build<'a> {
    cofferdam: &'a Cofferdam,
    flags: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    memory: Option<String>,
    expected: Expected,
    plain: bool,
    slots: Option<Slots>,
    slotless: bool,
    terminal: Option<Terminal>,
}

impl<'a> Build<'a> {
    pub(crate) fn new(cofferdam: &'a Cofferdam) -> Self {
        Self {
            cofferdam,
            flags: Vec::new(),
            environment: Vec::new(),
            memory: Some(MEMORY.to_owned()),
            expected: Expected::default(),
            plain: false,
            slots: None,
            slotless: false,
            terminal: None,
        }
    }

    /// Any flag of `cofferdam run` or `cofferdam build`, with its value.
    pub fn flag(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.flags.push(name.into());
        self.flags.push(value.into());
        self
    }

    /// Any flag that has no value.
    pub fn switch(mut self, name: &str) -> Self {
        self.flags.push(name.into());
        self
    }

    /// Runs on a terminal of this many rows and columns.
    pub fn on_terminal(mut self, size: (u16, u16)) -> Self {
        self.terminal = Some(Terminal::new(size));
        self
    }

    /// An output.
    pub fn output(mut self, path: &str) -> Self {
        self.expected.outputs.push(path.to_owned());
        self.flag("--output", path)
    }

    /// A path of this host as an input.
    pub fn input(self, name: &str, path: &Path) -> Self {
        let mut value = OsString::from(format!("{name}="));
        value.push(path);
        self.flag("--input", value)
    }

    /// A node of the store as an input.
    pub fn input_node(self, name: &str, node: &NodeText) -> Self {
        self.flag("--input", format!("{name}={node}"))
    }

    /// Memory, instead of the usual amount.
    pub fn memory(mut self, size: &str) -> Self {
        self.memory = Some(size.to_owned());
        self
    }

    /// A variable of the environment of `cofferdam` itself.
    pub fn host_variable(mut self, key: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((key.into(), value.into()));
        self
    }

    /// Prints results as text, not as JSON.
    pub fn plain(mut self) -> Self {
        self.plain = true;
        self
    }

    /// Exports the outputs to this host, for [`Outcome::read`].
    pub fn exported(mut self) -> Self {
        let to = self.cofferdam.fresh("out");
        self.expected.exported_to = Some(to.clone());
        self.flag("--out", to)
    }

    /// Runs without a slot: either there will be no VM, or the test has all slots.
    pub fn without_slot(mut self) -> Self {
        self.slotless = true;
        self
    }

    /// Runs on a daemon, which has a slot.
    pub fn on(self, daemon: &Daemon) -> Self {
        self.without_slot().flag("--daemon", daemon.addr())
    }

    /// Runs a script of the guest's shell to its end.
    pub fn shell(self, script: &str) -> Outcome {
        self.start_shell(script).end()
    }

    /// Starts a script of the guest's shell.
    pub fn start_shell(self, script: &str) -> Running {
        let mut this = self;
        this.flags.push("--bin-sh".into());
        this.start(["/bin/sh", "-c", script])
    }

    /// Runs a command to its end.
    pub fn run<const N: usize>(self, command: [&str; N]) -> Outcome {
        self.start(command).end()
    }

    /// Starts a command.
    pub fn start<const N: usize>(self, command: [&str; N]) -> Running {
        self.go("run", None, |process| {
            process.arg("--").args(command);
        })
    }

    /// Runs a request, in ProtoJSON, to its end.
    pub fn request(self, request: &Value) -> Outcome {
        self.request_text(&request.to_string())
    }

    /// Runs a text that may not be a valid request.
    pub fn request_text(mut self, text: &str) -> Outcome {
        if let Ok(request) = serde_json::from_str::<Value>(text) {
            let outputs = request["outputs"].as_array().into_iter().flatten();
            self.expected.outputs = outputs.filter_map(|path| path.as_str().map(str::to_owned)).collect();
        }
        let name = format!("request-{}.json", blake3::hash(text.as_bytes()).to_hex());
        let path = self.cofferdam.file(&name, text);
        self.go("build", Some(&path), |_| ()).end()
    }

    fn go(mut self, subcommand: &str, argument: Option<&Path>, more: impl FnOnce(&mut Command)) -> Running {
        if !self.slotless {
            self.slots = Some(slots::take_one());
        }
        let mut process = self.cofferdam.prepare();
        process.arg(subcommand).args(argument).args(&self.flags).envs(self.environment.iter().cloned());
        if let Some(memory) = &self.memory {
            process.args(["--memory", memory]);
        }
        let here = [("--vmm", vmm::asked().map(str::to_owned)), ("--connect-timeout", patience::connect_timeout())];
        // With a daemon they are in its configuration.
        let elsewhere = self.flags.iter().any(|flag| flag == "--daemon")
            || self.environment.iter().any(|(key, _)| key == "COFFERDAM_DAEMON");
        for (name, value) in here.into_iter().filter_map(|(name, value)| Some((name, value?))) {
            if !elsewhere && !self.flags.iter().any(|flag| flag == name) {
                process.args([name, &value]);
            }
        }
        if !self.plain {
            process.arg("--json");
        }
        more(&mut process);
        match self.terminal {
            Some(terminal) => Running::start_on(terminal, &process, self.expected, self.slots),
            None => self.cofferdam.start(process, self.expected, self.slots),
        }
    }
}
