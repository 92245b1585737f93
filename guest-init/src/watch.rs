//! Streams the build's output to the host until the build has ended.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use cofferdam_protocol::{
    End, FromGuest, FromHost, Report, Sample, Step, Stream, Usage,
    frame::{FrameError, FrameReader, MAX_DATA_BYTES},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{UsageWho, getrusage},
        signal::{Signal, kill},
        time::TimeValLike as _,
    },
    unistd::Pid,
};

use crate::{
    cgroup::Cgroup,
    command::{MAX_WORD_BYTES, Running, Word},
    error::{Context as _, SessionError, SetupError},
    scratch::Scratch,
    session::Host,
    sys,
};

/// How often the scratch disk is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How often the host is told what the build uses.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// One of the command's outputs, until its end.
struct Log {
    stream: Stream,
    pipe: Option<File>,
    ready: bool,
}

/// Sends what the build writes as it writes it; returns when nothing of it is left.
pub(crate) fn watch(
    host: &mut Host,
    running: Running,
    scratch: &mut Scratch,
    cgroup: &Cgroup,
) -> Result<Report, SessionError> {
    let Running { init, stdout, stderr, words, started } = running;
    let mut logs = [(Stream::Stdout, stdout), (Stream::Stderr, stderr)].map(|(stream, pipe)| Log {
        stream,
        pipe: Some(pipe),
        ready: false,
    });
    let mut buffer = vec![0; MAX_DATA_BYTES];
    let (mut looked, mut sampled) = (started, started);
    let mut stopped = false;
    loop {
        let ready = wait(host, &words, &mut logs)?;
        if ready.word {
            break;
        }
        if ready.host {
            stopped = true;
            stop(host, init)?;
        }
        for log in logs.iter_mut().filter(|log| log.ready) {
            log.forward(host, &mut buffer)?;
        }
        if looked.elapsed() >= LOOK_EVERY {
            scratch.look();
            looked = Instant::now();
        }
        if sampled.elapsed() >= SAMPLE_EVERY {
            sampled = Instant::now();
            host.say(&FromGuest::Sample(sample(started, scratch, cgroup)))?;
        }
    }
    let word = FrameReader::new(&words, MAX_WORD_BYTES).read::<Word>();
    // When it returns, the kernel has killed and reaped everything in the namespace.
    sys::wait(Some(init)).context(Step::Start, || "wait for the build's init")?;
    cgroup.kill();
    let wall = started.elapsed();
    scratch.look();
    for log in &mut logs {
        log.drain(host, &mut buffer)?;
    }
    Ok(Report {
        end: if stopped { End::Signaled(libc::SIGKILL as u8) } else { ended_how(word)? },
        out_of_memory: cgroup.out_of_memory(),
        scratch_full: scratch.was_full(),
        too_many_processes: cgroup.too_many_processes(),
        usage: usage(wall, scratch, cgroup),
    })
}

/// Who has something to say.
struct Ready {
    word: bool,
    host: bool,
}

/// Waits for a moment, for output, for the host, or for the init's word.
fn wait(host: &Host, words: &File, logs: &mut [Log; 2]) -> Result<Ready, SessionError> {
    let mut polled = vec![PollFd::new(host.as_fd(), PollFlags::POLLIN), PollFd::new(words.as_fd(), PollFlags::POLLIN)];
    let pipes = logs.iter().filter_map(|log| log.pipe.as_ref());
    polled.extend(pipes.map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
    let timeout = PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::ZERO);
    match poll(&mut polled, timeout) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(error) => return Err(error).context(Step::Start, || "wait for output").map_err(SessionError::from),
    }
    let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
    let mut pipes_ready = ready[2..].iter().copied();
    for log in logs {
        log.ready = log.pipe.is_some() && pipes_ready.next() == Some(true);
    }
    Ok(Ready { host: ready[0], word: ready[1] })
}

/// Kills the build's init, and with it all that is in its namespace, if the host says so.
fn stop(host: &Host, init: Pid) -> Result<(), SessionError> {
    match host.hear()? {
        FromHost::Stop => Ok(kill(init, Signal::SIGKILL).context(Step::Start, || "kill the build's init")?),
        _ => Err(SessionError::Unexpected { expected: "the order to stop" }),
    }
}

impl Log {
    /// Sends what one read gives, at most one frame's worth.
    fn forward(&mut self, host: &mut Host, buffer: &mut [u8]) -> Result<(), SessionError> {
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
        match pipe.read(buffer).context(Step::Start, || "read the command's output")? {
            0 => self.pipe = None,
            length => host.say(&FromGuest::Log { stream: self.stream, bytes: &buffer[..length] })?,
        }
        Ok(())
    }

    /// Sends what is left. A descriptor in flight over a Unix socket may keep the pipe open, so its end isn't awaited.
    fn drain(&mut self, host: &mut Host, buffer: &mut [u8]) -> Result<(), SessionError> {
        while let Some(pipe) = &self.pipe {
            let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
            if poll(&mut polled, PollTimeout::ZERO) != Ok(1) {
                break;
            }
            self.forward(host, buffer)?;
        }
        Ok(())
    }
}

fn ended_how(word: Result<Word, FrameError>) -> Result<End, SetupError> {
    match word {
        Ok(Word::Ended(end)) => Ok(end),
        Ok(Word::Failed { action, errno }) => {
            Err(SetupError { step: Step::Start, action, source: io::Error::from_raw_os_error(errno) })
        }
        Err(_) => Err(SetupError {
            step: Step::Start,
            action: "learn how the command ended".to_owned(),
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
        let micros = |time: nix::sys::time::TimeVal| u64::try_from(time.num_microseconds()).unwrap_or(0);
        usage.user_us = micros(children.user_time());
        usage.system_us = micros(children.system_time());
    }
    usage.wall_us = u64::try_from(wall.as_micros()).unwrap_or(u64::MAX);
    usage.scratch_bytes = scratch.used_bytes();
    usage
}
