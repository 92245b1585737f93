//! A static program that uses the network in guests: one line of output for each argument.

use std::{
    env, fs,
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

/// The gateway, which answers DNS queries.
const RESOLVER: &str = "192.0.0.1:53";

/// Long enough for an emulated machine on a busy host. Everything that is refused is refused at once.
const PATIENCE: Duration = Duration::from_secs(60);

fn connect(to: &str) -> io::Result<TcpStream> {
    let to: SocketAddr = to.parse().expect("an address");
    // Without a time limit, which would have it poll. That is woken before the kernel has both the error and the end in place.
    let stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends a request and returns all that comes back.
fn ask(to: &str, request: &[u8]) -> io::Result<String> {
    let mut stream = connect(to)?;
    stream.write_all(request)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().last().unwrap_or_default().to_owned())
}

fn http(to: &str, host: &str, path: &str) -> io::Result<String> {
    ask(to, format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n").as_bytes())
}

/// Sends so many bytes, says that they are all, and returns the answer.
fn upload(to: &str, count: usize) -> io::Result<String> {
    let mut stream = connect(to)?;
    let piece = vec![b'x'; 64 * 1024];
    let mut left = count;
    while left > 0 {
        left -= stream.write(&piece[..left.min(piece.len())])?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Counts the bytes of a download.
fn download(to: &str, host: &str, path: &str) -> io::Result<String> {
    let mut stream = connect(to)?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n").as_bytes())?;
    let (mut count, mut buffer) = (0, vec![0; 256 * 1024]);
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(count.to_string()),
            read => count += buffer[..read].iter().filter(|byte| **byte == b'x').count(),
        }
    }
}

/// Sends so many bytes once the other side has said all.
fn speak_last(to: &str, count: usize) -> io::Result<String> {
    let mut stream = connect(to)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    stream.write_all(&vec![b'x'; count])?;
    stream.shutdown(Shutdown::Write)?;
    Ok(said.trim_end().to_owned())
}

/// Keeps so many connections whose other side never reads, and as many whose other side sends much that is never read here,
/// until neither side can go on. Then asks for something else.
fn hoard(http_to: &str, mute: &str, count: usize) -> io::Result<String> {
    let piece = vec![b'x'; 256 * 1024];
    let (mut unread, mut unheard) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let mut stream = connect(http_to)?;
        stream.write_all(b"GET /100000000 HTTP/1.0\r\nHost: nobody\r\n\r\n")?;
        assert_eq!(stream.peek(&mut [0])?, 1, "nothing comes");
        unread.push(stream);
        let stream = connect(mute)?;
        stream.set_nonblocking(true)?;
        unheard.push(stream);
    }
    let mut taken = Instant::now();
    while taken.elapsed() < Duration::from_millis(500) {
        for stream in &mut unheard {
            while stream.write(&piece).is_ok() {
                taken = Instant::now();
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
    println!("hoarded {}", unread.len() + unheard.len());
    drop((unread, unheard));
    http(http_to, "nobody", "/")
}

/// Asks each address of a name, those of IPv6 first.
fn http_by_each(name: &str, port: &str) -> io::Result<String> {
    let mut words = Vec::new();
    for kind in ["AAAA", "A"] {
        for address in dns(name, kind)?.split(' ').skip(2) {
            let to = SocketAddr::new(address.parse().expect("an address"), port.parse().expect("a port"));
            words.push(http(&to.to_string(), name, "/").unwrap_or_else(|error| told(&error)));
        }
    }
    Ok(words.join(", then "))
}

/// Asks a name, by whichever of its addresses the system's library takes.
fn http_by_name(name: &str, port: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(format!("{name}:{port}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET / HTTP/1.0\r\nHost: {name}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().last().unwrap_or_default().to_owned())
}

fn udp(to: &str, message: &[u8]) -> io::Result<Vec<u8>> {
    let to: SocketAddr = to.parse().expect("an address");
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to)?;
    socket.send(message)?;
    let mut answer = [0; 4096];
    let length = socket.recv(&mut answer)?;
    Ok(answer[..length].to_vec())
}

fn query(name: &str, kind: &str) -> Vec<u8> {
    let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.bytes());
    }
    let kind = match kind {
        "A" => 1,
        "AAAA" => 28,
        "HTTPS" => 65,
        _ => panic!("type {kind}"),
    };
    message.extend([0, 0, kind, 0, 1]);
    message
}

/// The code of an answer, and its addresses.
fn addresses(query: &[u8], answer: &[u8]) -> String {
    assert_eq!(answer[..2], query[..2], "the id of an answer");
    let mut words = vec![format!("code {}", answer[3] & 15)];
    let mut rest = &answer[query.len()..];
    for _ in 0..u16::from_be_bytes([answer[6], answer[7]]) {
        // The name is a reference of two bytes.
        let length = usize::from(u16::from_be_bytes([rest[10], rest[11]]));
        let data = &rest[12..12 + length];
        words.push(match <[u8; 4]>::try_from(data) {
            Ok(four) => IpAddr::from(four).to_string(),
            Err(_) => IpAddr::from(<[u8; 16]>::try_from(data).expect("an address")).to_string(),
        });
        rest = &rest[12 + length..];
    }
    words.join(" ")
}

fn dns(name: &str, kind: &str) -> io::Result<String> {
    let query = query(name, kind);
    Ok(addresses(&query, &udp(RESOLVER, &query)?))
}

fn tcp_dns(name: &str, kind: &str) -> io::Result<String> {
    let (query, mut stream) = (query(name, kind), connect(RESOLVER)?);
    stream.write_all(&(query.len() as u16).to_be_bytes())?;
    stream.write_all(&query)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer)?;
    Ok(addresses(&query, &answer))
}

fn told(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => "refused".to_owned(),
        ErrorKind::ConnectionReset => "reset".to_owned(),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "unreachable".to_owned(),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timed out".to_owned(),
        _ => error.to_string(),
    }
}

fn main() {
    for argument in env::args().skip(1) {
        let words: Vec<&str> = argument.split(' ').collect();
        let done = match words[..] {
            ["dns", name, kind] => dns(name, kind),
            ["tcp-dns", name, kind] => tcp_dns(name, kind),
            ["http", to, host] => http(to, host, "/"),
            ["http-many", to, host, count] => {
                let count: usize = count.parse().expect("a number");
                (0..count).map(|_| http(to, host, "/")).collect::<io::Result<Vec<_>>>().map(|all| all.len().to_string())
            }
            ["http-hold", to, host, count] => {
                let count: usize = count.parse().expect("a number");
                let streams: Vec<_> = (0..count).map(|_| connect(to)).collect();
                let open = streams.iter().filter(|stream| stream.is_ok()).count();
                drop(streams);
                // Their ends have to reach the servers first.
                let begun = Instant::now();
                let answer = loop {
                    match http(to, host, "/") {
                        Err(error) if error.kind() == ErrorKind::ConnectionRefused && begun.elapsed() < PATIENCE => {}
                        answer => break answer,
                    }
                };
                answer.map(|answer| format!("{open}, then {answer}"))
            }
            ["get", to, host, path] => http(to, host, path),
            ["count", to, host, path] => download(to, host, path),
            ["send-file", to, file] => ask(to, &fs::read(file).expect("an input")),
            ["listen", to] => ask(to, b""),
            ["upload", to, count] => upload(to, count.parse().expect("a number")),
            ["speak-last", to, count] => speak_last(to, count.parse().expect("a number")),
            ["hoard", http_to, mute, count] => hoard(http_to, mute, count.parse().expect("a number")),
            ["http-by-name", name, port] => http_by_name(name, port),
            ["http-by-each", name, port] => http_by_each(name, port),
            ["udp", to] => udp(to, b"hello").map(|_| "answered".to_owned()),
            _ => panic!("{argument:?} means nothing"),
        };
        println!("{argument}: {}", done.unwrap_or_else(|error| told(&error)));
    }
}
