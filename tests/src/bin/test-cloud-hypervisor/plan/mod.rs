//! Decides which tests remain, which are tried again, and when to give up. It is pure: it starts nothing and has no clock.
//!
//! ```text
//!   next_machine() ──▶ the tests for a fresh machine; none at the end
//!   see(event)         a test began or ended in it
//!   machine_ended()    each test that still ran has used up a try
//! ```
//!
//! A test is tried again in a fresh machine if it fails, or if its machine hangs or dies. After [`TRIES`] tries it has failed.
//! If no test begins in [`TRIES`] machines in a row, the plan gives up.

use std::fmt;

use crate::event::Event;

/// Most tries of a test.
pub(crate) const TRIES: usize = 3;

/// The state of a test in the present machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Running,
    Passed,
}

#[derive(Debug)]
struct Test {
    name: String,
    state: State,
    tries: usize,
    /// The ends of the tries that did not pass.
    setbacks: Vec<String>,
}

impl Test {
    fn new(name: String) -> Self {
        Self { name, state: State::Waiting, tries: 0, setbacks: Vec::new() }
    }

    fn is_left(&self) -> bool {
        self.state != State::Passed && self.setbacks.len() < TRIES
    }

    fn set_back(&mut self, reason: &str) {
        self.state = State::Waiting;
        self.setbacks.push(reason.to_owned());
    }
}

/// A line of the summary: the outcome, the name, and every try if one didn't pass.
impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (outcome, last) = match self.state {
            State::Passed => ("passed when tried again", Some("passed")),
            _ if !self.is_left() => ("FAILED", None),
            State::Running => ("did not end", Some("did not end")),
            State::Waiting if self.setbacks.is_empty() => ("did not run", None),
            State::Waiting => ("not tried again", None),
        };
        write!(f, "{outcome}: {}", self.name)?;
        if self.setbacks.is_empty() {
            return Ok(());
        }
        let tries: Vec<_> = self.setbacks.iter().map(String::as_str).chain(last).collect();
        write!(f, " ({})", tries.join(", then "))
    }
}

/// All tests of a run, over all its machines.
#[derive(Debug)]
pub(crate) struct Plan {
    tests: Vec<Test>,
    machines: usize,
    /// Whether a test has begun in the present machine.
    began: bool,
    /// The number of machines in a row that ended before a test began.
    idle_machines: usize,
    given_up: Option<String>,
}

impl Plan {
    pub(crate) fn new(names: impl IntoIterator<Item = String>) -> Self {
        let tests = names.into_iter().map(Test::new).collect();
        Self { tests, machines: 0, began: false, idle_machines: 0, given_up: None }
    }

    /// Counts a fresh machine and returns its tests. Tests with a setback come last, because they may have another one.
    pub(crate) fn next_machine(&mut self) -> Option<Vec<String>> {
        let mut left: Vec<_> = self.tests.iter().filter(|test| test.is_left()).collect();
        if left.is_empty() || self.given_up.is_some() {
            return None;
        }
        left.sort_by_key(|test| test.setbacks.len());
        self.machines += 1;
        self.began = false;
        Some(left.into_iter().map(|test| test.name.clone()).collect())
    }

    /// Records an event. Returns `false` if it is impossible: an unknown or finished test, or an end without a beginning.
    pub(crate) fn see(&mut self, event: &Event) -> bool {
        let (Event::Began { test } | Event::Passed { test, .. } | Event::Failed { test, .. }) = event;
        let Some(test) = self.tests.iter_mut().find(|known| known.name == *test) else { return false };
        match (event, test.state) {
            (Event::Began { .. }, State::Waiting) if test.is_left() => {
                test.state = State::Running;
                test.tries += 1;
                self.began = true;
            }
            (Event::Passed { .. }, State::Running) => test.state = State::Passed,
            (Event::Failed { .. }, State::Running) => test.set_back("failed"),
            _ => return false,
        }
        true
    }

    /// Records the end of the machine. `reason` says what happened to the tests that still ran.
    pub(crate) fn machine_ended(&mut self, reason: &str) {
        for test in self.tests.iter_mut().filter(|test| test.state == State::Running) {
            test.set_back(reason);
        }
        self.idle_machines = if self.began { 0 } else { self.idle_machines + 1 };
        if self.idle_machines == TRIES {
            self.give_up(format!("{TRIES} machines in a row ended before a test began"));
        }
    }

    /// Starts no further machine.
    pub(crate) fn give_up(&mut self, reason: String) {
        self.given_up = Some(reason);
    }

    /// Whether every test has passed in one of its tries.
    pub(crate) fn passed(&self) -> bool {
        self.tests.iter().all(|test| test.state == State::Passed)
    }

    /// A line for each test that was tried again or has not passed, then one line with the numbers.
    pub(crate) fn summary(&self, vmm: &str, seconds: u64) -> String {
        let mut lines: Vec<_> = self
            .tests
            .iter()
            .filter(|test| test.tries != 1 || test.state != State::Passed)
            .map(Test::to_string)
            .collect();
        lines.extend(self.given_up.iter().map(|reason| format!("gave up: {reason}")));
        let count = |wanted: fn(&&Test) -> bool| self.tests.iter().filter(wanted).count();
        let failed = count(|test| test.state != State::Passed && !test.is_left());
        let unfinished = count(|test| test.is_left());
        let outcome = match (failed, unfinished) {
            (0, 0) => "all passed".to_owned(),
            (failed, 0) => format!("{failed} failed"),
            (failed, unfinished) => format!("{failed} failed, {unfinished} unfinished"),
        };
        let retries = self.tests.iter().map(|test| test.tries.saturating_sub(1)).sum();
        lines.push(format!(
            "{} with {vmm}, {}, {}, {seconds} s: {outcome}",
            counted(self.tests.len(), "whole-system test", "whole-system tests"),
            counted(self.machines, "machine", "machines"),
            counted(retries, "retry", "retries"),
        ));
        lines.join("\n")
    }
}

fn counted(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

#[cfg(test)]
mod tests;
