//! Servers on all addresses, by their ports. Those of HTTP answer a path that is a number with so many bytes.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    thread,
};

use anyhow::Context as _;

/// What a server does with a connection.
type Serve = fn(TcpStream) -> std::io::Result<()>;

/// Ports. On 22 the server speaks first, on 7 it hears all before it answers, on 9 it resets.
const SERVERS: [(u16, Serve); 6] = [
    (80, http),
    (443, echo),
    (8080, http),
    (22, |mut stream| stream.write_all(b"SSH-2.0-lab\r\n")),
    (7, count),
    (9, reset),
];

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
