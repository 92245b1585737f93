//! Sends the command's output to the host until the command has ended.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use cofferdam_protocol::{
    End, FromGuest, FromHost, Report, Sample, Step, Usage,
    frame::{FrameError, FrameReader, MAX_DATA_BYTES},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{UsageWho, getrusage},
        signal::{Signal, kill},
        time::{TimeVal, TimeValLike as _},
    },
    unistd::Pid,
};

use crate::{
    cgroup::Cgroup,
    command::{MAX_OUTCOME_BYTES, Outcome, Running, Screen},
    error::{Context as _, SessionError, SetupError},
    host::Host,
    scratch::Scratch,
    sys,
    terminal::Terminal,
};

/// How often to check whether the scratch disk is full.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// How often to send a [`Sample`].
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// How long less than a frame waits for more after the frame before it. Each frame costs both sides much more than its bytes do.
const GATHER_INTERVAL: Duration = Duration::from_millis(5);

/// The source of the command's output.
enum Source {
    /// `None` after its end.
    Log(Option<Log>),
    Terminal(Terminal),
}

struct Log {
    pipe: File,
    /// When something was sent last.
    sent: Option<Instant>,
}

/// Sends the command's output as it is written. Returns when no process of the build is left.
pub(crate) fn run(
    host: &mut Host,
    running: Running,
    scratch: &mut Scratch,
    cgroup: &Cgroup,
) -> Result<Report, SessionError> {
    let Running { init, screen, outcome, started } = running;
    let mut source = match screen {
        Screen::Log(pipe) => Source::Log(Some(Log { pipe, sent: None })),
        Screen::Terminal(terminal) => Source::Terminal(terminal),
    };
    let mut buffer = vec![0; MAX_DATA_BYTES];
    let (mut checked, mut sampled) = (started, started);
    let mut stopped = false;
    loop {
        let ready = wait(host, &outcome, &source)?;
        if ready.outcome {
            break;
        }
        if ready.host {
            stopped |= source.receive(host, init)?;
        }
        if let Source::Terminal(terminal) = &mut source {
            terminal.write_input();
        }
        if ready.output {
            source.gather(host, &outcome)?;
            source.forward(host, &mut buffer)?;
        }
        if checked.elapsed() >= CHECK_INTERVAL {
            scratch.check_full();
            checked = Instant::now();
        }
        if sampled.elapsed() >= SAMPLE_INTERVAL {
            sampled = Instant::now();
            host.send(&FromGuest::Sample(sample(started, scratch, cgroup)))?;
        }
    }
    let outcome = FrameReader::new(&outcome, MAX_OUTCOME_BYTES).read::<Outcome>();
    // When this returns, the kernel has killed and reaped every process in the namespace.
    sys::wait(Some(init)).context(Step::Start, || "wait for the build's init")?;
    cgroup.kill();
    let wall = started.elapsed();
    scratch.check_full();
    source.drain(host, &mut buffer)?;
    Ok(Report {
        end: if stopped { End::Signaled(libc::SIGKILL as u8) } else { command_end(outcome)? },
        out_of_memory: cgroup.out_of_memory(),
        scratch_full: scratch.was_full(),
        too_many_processes: cgroup.too_many_processes(),
        usage: usage(wall, scratch, cgroup),
    })
}

/// The descriptors that are ready.
struct Ready {
    outcome: bool,
    host: bool,
    output: bool,
}

/// Waits for output, for the host, or for the end of the command, at most [`CHECK_INTERVAL`].
fn wait(host: &Host, outcome: &File, source: &Source) -> Result<Ready, SessionError> {
    let (host_events, output) = match source {
        Source::Log(log) => {
            (PollFlags::POLLIN, log.as_ref().map(|log| PollFd::new(log.pipe.as_fd(), PollFlags::POLLIN)))
        }
        Source::Terminal(terminal) => (terminal.host_events(), Some(terminal.poll_fd())),
    };
    let mut polled = vec![PollFd::new(host.as_fd(), host_events), PollFd::new(outcome.as_fd(), PollFlags::POLLIN)];
    polled.extend(output);
    wait_for(&mut polled, CHECK_INTERVAL)?;
    let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
    Ok(Ready { host: ready[0], outcome: ready[1], output: ready.get(2) == Some(&true) })
}

fn wait_for(polled: &mut [PollFd<'_>], limit: Duration) -> Result<(), SetupError> {
    sys::poll(polled, limit).context(Step::Start, || "wait for output")
}

impl Source {
    /// Lets the log grow to a frame, unless something else happens: at most [`GATHER_INTERVAL`] after the frame before.
    fn gather(&self, host: &Host, outcome: &File) -> Result<(), SetupError> {
        let Self::Log(Some(Log { pipe, sent: Some(sent) })) = self else { return Ok(()) };
        let left = GATHER_INTERVAL.saturating_sub(sent.elapsed());
        if left.is_zero() || sys::readable_bytes(pipe) >= MAX_DATA_BYTES {
            return Ok(());
        }
        let others = [host.as_fd(), outcome.as_fd()];
        wait_for(&mut others.map(|fd| PollFd::new(fd, PollFlags::POLLIN)), left)
    }

    /// Receives input for the terminal, or the order to stop, which kills the build's init and with it every process in its
    /// namespace. Returns whether it was that order.
    fn receive(&mut self, host: &Host, init: Pid) -> Result<bool, SessionError> {
        match (host.receive()?, self) {
            (FromHost::Stop, _) => {
                kill(init, Signal::SIGKILL).context(Step::Start, || "kill the build's init")?;
                return Ok(true);
            }
            (FromHost::Input(bytes), Self::Terminal(terminal)) => terminal.take(&bytes),
            (FromHost::Resize(size), Self::Terminal(terminal)) => terminal.resize(size),
            _ => return Err(SessionError::Unexpected { expected: "the order to stop" }),
        }
        Ok(false)
    }

    /// Reads once, and sends what was read: at most one frame.
    fn forward(&mut self, host: &mut Host, buffer: &mut [u8]) -> Result<(), SessionError> {
        match self {
            Self::Terminal(terminal) => drop(terminal.send_output(host, buffer)?),
            Self::Log(Some(log)) => match log.pipe.read(buffer).context(Step::Start, || "read the command's output")? {
                0 => *self = Self::Log(None),
                length => {
                    host.send(&FromGuest::Log(&buffer[..length]))?;
                    log.sent = Some(Instant::now());
                }
            },
            Self::Log(None) => {}
        }
        Ok(())
    }

    /// Sends what is still there. It doesn't wait for the pipe's end: a descriptor that was sent over a Unix socket and never
    /// received may keep the pipe open.
    fn drain(&mut self, host: &mut Host, buffer: &mut [u8]) -> Result<(), SessionError> {
        if let Self::Terminal(terminal) = self {
            while terminal.send_output(host, buffer)? > 0 {}
        }
        while let Self::Log(Some(log)) = self {
            let mut polled = [PollFd::new(log.pipe.as_fd(), PollFlags::POLLIN)];
            if poll(&mut polled, PollTimeout::ZERO) != Ok(1) {
                break;
            }
            self.forward(host, buffer)?;
        }
        Ok(())
    }
}

fn command_end(outcome: Result<Outcome, FrameError>) -> Result<End, SetupError> {
    match outcome {
        Ok(Outcome::Ended(end)) => Ok(end),
        Ok(Outcome::Failed { action, errno }) => {
            Err(SetupError { step: Step::Start, action, source: io::Error::from_raw_os_error(errno) })
        }
        Err(_) => Err(SetupError {
            step: Step::Start,
            action: "find out how the command ended".to_owned(),
            source: io::Error::other("the build's init died"),
        }),
    }
}

fn sample(started: Instant, scratch: &Scratch, cgroup: &Cgroup) -> Sample {
    let usage = usage(started.elapsed(), scratch, cgroup);
    Sample { usage, memory_bytes: cgroup.memory_bytes(), processes: cgroup.processes() }
}

fn usage(wall: Duration, scratch: &Scratch, cgroup: &Cgroup) -> Usage {
    let mut usage = cgroup.usage();
    if let Ok(children) = getrusage(UsageWho::RUSAGE_CHILDREN)
        && usage.user_us + usage.system_us == 0
    {
        let micros = |time: TimeVal| u64::try_from(time.num_microseconds()).unwrap_or(0);
        usage.user_us = micros(children.user_time());
        usage.system_us = micros(children.system_time());
    }
    usage.wall_us = u64::try_from(wall.as_micros()).unwrap_or(u64::MAX);
    usage.scratch_bytes = scratch.used_bytes();
    usage
}
