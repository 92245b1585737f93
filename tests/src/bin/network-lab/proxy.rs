//! The internet's proxy, which only knows CONNECT. What it does depends on the name that it is asked for.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    thread,
};

use anyhow::Context as _;

use crate::dns;

/// `user:secret`
const CREDENTIALS: &str = "Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=";

pub(crate) fn start(log: &Path) -> anyhow::Result<()> {
    let log = Arc::new(File::options().create(true).append(true).open(log).context("the log can't be opened")?);
    let listener = TcpListener::bind("10.0.0.5:3128").context("the proxy")?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let log = Arc::clone(&log);
            // A client that has gone is none of its business.
            thread::spawn(move || drop(serve(stream, &log)));
        }
    });
    Ok(())
}

fn serve(mut client: TcpStream, mut log: &File) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head);
    let target = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    log.write_all(format!("proxy {target}\n").as_bytes())?;
    let (host, port) = target.rsplit_once(':').unwrap_or_default();
    if !head.lines().any(|line| line == CREDENTIALS) {
        return client.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n");
    }
    match host {
        "evil.example" => return client.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n"),
        "turns.example" => return client.write_all(b"SSH-2.0-proxy\r\n\r\n"),
        _ => {}
    }
    let address = dns::address(host).or_else(|| host.parse().ok());
    let server = address.and_then(|address| TcpStream::connect((address, port.parse().ok()?)).ok());
    let Some(server) = server else { return client.write_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n") };
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    let (from, to) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || copy(from, to));
    copy(server, client)
}

fn copy(mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
    io::copy(&mut from, &mut to)?;
    to.shutdown(Shutdown::Write)
}
