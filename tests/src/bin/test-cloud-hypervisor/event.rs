//! The lines in which the program that runs the tests reports to its supervisor.

use std::{fmt, str::FromStr};

/// The prefix of every line of a test's own output, so that none looks like an event.
pub(crate) const INDENT: &str = "    ";

/// A test began or ended. It is written as one line: `passed deaths::the_vmm_is_killed (12 s)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Began { test: String },
    Passed { test: String, seconds: u64 },
    Failed { test: String, seconds: u64 },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Began { test } => write!(f, "began {test}"),
            Self::Passed { test, seconds } => write!(f, "passed {test} ({seconds} s)"),
            Self::Failed { test, seconds } => write!(f, "FAILED {test} ({seconds} s)"),
        }
    }
}

/// The line is not an event.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoEvent;

impl FromStr for Event {
    type Err = NoEvent;

    fn from_str(line: &str) -> Result<Self, NoEvent> {
        let (what, rest) = line.split_once(' ').ok_or(NoEvent)?;
        if what == "began" {
            return if rest.contains(' ') { Err(NoEvent) } else { Ok(Self::Began { test: rest.to_owned() }) };
        }
        let (test, seconds) = rest.strip_suffix(" s)").and_then(|rest| rest.split_once(" (")).ok_or(NoEvent)?;
        let (test, seconds) = (test.to_owned(), seconds.parse().map_err(|_| NoEvent)?);
        match what {
            "passed" => Ok(Self::Passed { test, seconds }),
            "FAILED" => Ok(Self::Failed { test, seconds }),
            _ => Err(NoEvent),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_as_it_was_written() {
        let test = "deaths::the_vmm_is_killed".to_owned();
        for event in [
            Event::Began { test: test.clone() },
            Event::Passed { test: test.clone(), seconds: 0 },
            Event::Failed { test, seconds: 4711 },
        ] {
            assert_eq!(event.to_string().parse(), Ok(event));
        }
    }

    #[test]
    fn other_lines_are_no_events() {
        for line in [
            "",
            "began",
            "began the next test",
            "passed a::b",
            "passed a::b (x s)",
            "    passed a::b (1 s)",
            "ok a (1 s)",
        ] {
            assert_eq!(line.parse::<Event>(), Err(NoEvent), "{line:?}");
        }
    }
}
