//! The conversation with the host, from Hello to Acknowledge; drawn in `cofferdam_protocol`.

use std::{
    error::Error,
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
    thread::sleep,
    time::{Duration, Instant},
};

use cofferdam_protocol::{
    FromGuest, FromHost, HOST_CID, PORT, SetupFailure, Specification, Step, VERSION,
    frame::{FrameError, FrameReader, FrameWriter, MAX_FROM_GUEST_BYTES, MAX_FROM_HOST_BYTES},
};
use nix::{
    sys::{
        socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, setsockopt, socket, sockopt},
        time::{TimeVal, TimeValLike as _},
    },
    time::{ClockId, clock_gettime},
};

use crate::{
    boot,
    cgroup::Cgroup,
    command::{self, Command},
    error::{SessionError, SetupError, bounded},
    outputs,
    root::{self, Root},
    scratch::Scratch,
    shell, watch,
};

/// How long the vsock device may take to appear and the host to accept before the console is told.
const DIAL_WAIT: Duration = Duration::from_secs(10);

/// How long the host may take to acknowledge; it ends the machine itself long before.
const ACKNOWLEDGE_WAIT_S: i64 = 600;

/// The connection.
pub(crate) struct Host {
    writer: FrameWriter<File>,
    socket: File,
}

/// Runs the one build of this machine and ends the machine.
pub(crate) fn run() -> ! {
    std::panic::set_hook(Box::new(|panic| {
        tell(&format!("guest-init: {panic}"));
        boot::power_off()
    }));
    if let Err(error) = boot::prepare() {
        complain(&error);
        boot::power_off()
    }
    if let Err(error) = converse() {
        complain(&error);
    }
    boot::power_off()
}

fn converse() -> Result<(), SessionError> {
    let mut host = Host::dial().map_err(FrameError::Io)?;
    host.say(&FromGuest::Hello { version: VERSION, uptime_us: uptime_us() })?;
    host.tell_of_panics().map_err(FrameError::Io)?;
    // Done while the specification is on its way; a warm machine has it behind it when the request comes.
    let scratch = Scratch::prepare();
    let FromHost::Specification(specification) = host.hear()? else {
        return Err(SessionError::Unexpected { expected: "a specification" });
    };
    let ran = match build(&mut host, scratch, specification) {
        Err(SessionError::Setup(error)) => {
            host.say(&failure(&error, &error.detail()))?;
            None
        }
        other => Some(other?),
    };
    loop {
        match (await_answer(&host.socket)?, &ran) {
            (FromHost::Acknowledge, _) => return Ok(()),
            (FromHost::Keep(limits), Some(ran)) => {
                host.say_much(|host| outputs::keep(host, &ran.root.writable, limits))?;
            }
            (FromHost::Shell { term, size }, Some(ran)) => return shell::run(&mut host, ran, &term, size),
            // The command has ended by itself.
            (FromHost::Stop, _) => {}
            _ => return Err(SessionError::Unexpected { expected: "an acknowledgement" }),
        }
    }
}

/// A build whose command has ended.
pub(crate) struct Ran {
    pub(crate) specification: Specification,
    pub(crate) root: Root,
    pub(crate) cgroup: Cgroup,
}

fn build(
    host: &mut Host,
    scratch: Result<Scratch, SetupError>,
    mut specification: Specification,
) -> Result<Ran, SessionError> {
    let mut scratch = scratch?;
    let root = root::assemble(&specification)?;
    // They are in their places; the memory is the build's.
    specification.additional_files = Vec::new();
    let command = Command::new(&specification, &root.processes)?;
    let cgroup = Cgroup::create(specification.processes)?;
    let running = command::start(&command, &cgroup)?;
    let report = watch::watch(host, running, &mut scratch, &cgroup)?;
    let succeeded = report.succeeded();
    host.say(&FromGuest::Exited(report))?;
    if succeeded {
        host.say_much(|host| outputs::send(host, &specification.outputs))?;
    }
    Ok(Ran { specification, root, cgroup })
}

fn failure<'a>(error: &SetupError, detail: &'a str) -> FromGuest<'a> {
    FromGuest::SetupFailed(SetupFailure { step: error.step, detail })
}

impl Host {
    /// Dials until the host accepts; the vsock device may not be there yet.
    ///
    /// Only the host knows how busy it is, and ends a machine that doesn't get through in time.
    fn dial() -> io::Result<Self> {
        let start = Instant::now();
        let mut is_told = false;
        loop {
            let socket = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            match connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, PORT)) {
                Err(error) => {
                    if start.elapsed() > DIAL_WAIT && !is_told {
                        is_told = true;
                        tell(&format!("guest-init: the host does not answer: {error}; dialing on"));
                    }
                    sleep(Duration::from_millis(10));
                }
                Ok(()) => return Self::new(socket.into()),
            }
        }
    }

    fn new(socket: File) -> io::Result<Self> {
        Ok(Self { writer: FrameWriter::new(socket.try_clone()?, MAX_FROM_GUEST_BYTES), socket })
    }

    /// From here on the host hears of a panic before the machine ends.
    fn tell_of_panics(&self) -> io::Result<()> {
        let socket = self.socket.try_clone()?;
        std::panic::set_hook(Box::new(move |panic| {
            tell(&format!("guest-init: {panic}"));
            let detail = bounded(format!("guest-init panicked: {panic}"));
            let message = FromGuest::SetupFailed(SetupFailure { step: Step::Start, detail: &detail });
            let _ = FrameWriter::new(&socket, MAX_FROM_GUEST_BYTES).write(&message);
            let _ = await_answer(&socket);
            boot::power_off()
        }));
        Ok(())
    }

    /// Sends many messages: small frames share a write, which is still no larger than one frame may be.
    fn say_much(
        &self,
        say: impl FnOnce(&mut FrameWriter<&mut BufWriter<&File>>) -> Result<(), FrameError>,
    ) -> Result<(), FrameError> {
        let mut batch = BufWriter::with_capacity(MAX_FROM_GUEST_BYTES, &self.socket);
        say(&mut FrameWriter::new(&mut batch, MAX_FROM_GUEST_BYTES))?;
        batch.flush().map_err(FrameError::Io)
    }

    /// Waits for what the host says. Each time with a reader of its own, whose buffer is gone when the build needs the
    /// memory.
    pub(crate) fn hear(&self) -> Result<FromHost, FrameError> {
        FrameReader::new(&self.socket, MAX_FROM_HOST_BYTES).read()
    }

    /// Sends one message.
    pub(crate) fn say(&mut self, message: &FromGuest<'_>) -> Result<(), FrameError> {
        self.writer.write(message)
    }
}

impl AsFd for Host {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Waits for the host's last word, until the connection ends or for [`ACKNOWLEDGE_WAIT_S`].
fn await_answer(socket: &File) -> Result<FromHost, FrameError> {
    let _ = setsockopt(socket, sockopt::ReceiveTimeout, &TimeVal::seconds(ACKNOWLEDGE_WAIT_S));
    FrameReader::new(socket, MAX_FROM_HOST_BYTES).read()
}

fn uptime_us() -> u64 {
    let clock = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    u64::try_from(clock.as_micros()).unwrap_or(u64::MAX)
}

/// Tells the console, where somebody may look when the host hears nothing.
fn complain(error: &dyn Error) {
    let mut text = format!("guest-init: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    tell(&text);
}

/// Through the kernel's log, since the console's driver may be a module that was loaded long after the standard streams
/// were opened. As an error, which `quiet` lets through.
fn tell(text: &str) {
    let log = OpenOptions::new().write(true).open("/dev/kmsg");
    if log.and_then(|mut log| log.write_all(format!("<3>{text}").as_bytes())).is_err() {
        eprintln!("{text}");
    }
}
