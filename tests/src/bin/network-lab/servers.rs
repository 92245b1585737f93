//! Servers on all addresses, by their ports. Those of HTTP answer a path that is a number with so many bytes.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
};

use anyhow::Context as _;

/// What a server does with a connection.
type Serve = fn(TcpStream) -> std::io::Result<()>;

/// Ports. On 22 the server speaks first, on 7 it hears all before it answers, on 9 it resets, on 10 after it has sent much.
/// On 11 it says all before it hears anything, and on 13 how much that was. On 12 it never reads.
const SERVERS: [(u16, Serve); 10] = [
    (80, http),
    (443, echo),
    (8080, http),
    (22, |mut stream| stream.write_all(b"SSH-2.0-lab\r\n")),
    (7, count),
    (9, reset),
    (10, reset_later),
    (11, count_after_the_end),
    (12, ignore),
    (13, tell_of_11),
];

/// How much was heard on port 11.
static HEARD: (Mutex<Option<u64>>, Condvar) = (Mutex::new(None), Condvar::new());

/// Bytes that are sent at a time.
const PIECE: usize = 256 << 10;

pub(crate) fn start(log: &Path) -> anyhow::Result<()> {
    let log = Arc::new(File::options().create(true).append(true).open(log).context("the log can't be opened")?);
    for (port, serve) in SERVERS {
        // Of IPv4, too.
        let listener = TcpListener::bind(("::", port)).with_context(|| format!("port {port}"))?;
        let log = Arc::clone(&log);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if let Ok(address) = stream.local_addr() {
                    let _ = (&*log).write_all(format!("{} {port}\n", address.ip().to_canonical()).as_bytes());
                }
                // A client that has gone is none of its business.
                thread::spawn(move || drop(serve(stream)));
            }
        });
    }
    Ok(())
}

fn http(mut stream: TcpStream) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head);
    let host = head.lines().find_map(|line| line.strip_prefix("Host: ")).unwrap_or("nobody");
    stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n")?;
    let path = head.strip_prefix("GET /").and_then(|rest| rest.split(' ').next());
    if let Some(mut left) = path.and_then(|path| path.parse::<usize>().ok()) {
        let piece = vec![b'x'; PIECE];
        while left > 0 {
            left -= stream.write(&piece[..left.min(PIECE)])?;
        }
        return Ok(());
    }
    stream.write_all(format!("this is {host}\n").as_bytes())
}

/// Tells how much it was sent at first.
fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let read = stream.read(&mut [0; 65536])?;
    stream.write_all(format!("got {read} bytes\n").as_bytes())
}

/// Tells how much it was sent, once that is all.
fn count(mut stream: TcpStream) -> std::io::Result<()> {
    let (mut all, mut buffer) = (0, vec![0; 65536]);
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            read => all += read,
        }
    }
    stream.write_all(format!("got {all} bytes").as_bytes())?;
    stream.shutdown(Shutdown::Both)
}

/// Closes with bytes unread, which resets the connection.
fn reset(mut stream: TcpStream) -> std::io::Result<()> {
    stream.read_exact(&mut [0])
}

fn reset_later(mut stream: TcpStream) -> std::io::Result<()> {
    stream.write_all(&vec![b'x'; PIECE])?;
    reset(stream)
}

fn count_after_the_end(mut stream: TcpStream) -> std::io::Result<()> {
    stream.write_all(b"over\r\n")?;
    stream.shutdown(Shutdown::Write)?;
    let count = std::io::copy(&mut stream, &mut std::io::sink())?;
    let (heard, is_there) = &HEARD;
    *heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(count);
    is_there.notify_all();
    Ok(())
}

fn tell_of_11(mut stream: TcpStream) -> std::io::Result<()> {
    let (heard, is_there) = &HEARD;
    let heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    let heard = is_there.wait_while(heard, |heard| heard.is_none()).unwrap_or_else(PoisonError::into_inner);
    let count = heard.unwrap_or_default();
    stream.write_all(format!("heard {count} bytes\r\n").as_bytes())
}

/// Keeps a connection without reading.
fn ignore(stream: TcpStream) -> std::io::Result<()> {
    let _kept = stream;
    loop {
        thread::park();
    }
}
