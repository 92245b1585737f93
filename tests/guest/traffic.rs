//! A static program that measures the network of guests: one line with microseconds for each argument.

use std::{
    env,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket},
    thread::{self, JoinHandle},
    time::Instant,
};

const PIECE: usize = 256 * 1024;

/// A server of this machine's own, for so many connections, and where it listens.
fn serve(connections: usize, work: fn(TcpStream) -> io::Result<()>) -> io::Result<(String, JoinHandle<()>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let place = listener.local_addr()?.to_string();
    let server = thread::spawn(move || {
        listener.incoming().take(connections).for_each(|stream| work(stream.unwrap()).unwrap());
    });
    Ok((place, server))
}

fn request(path: &str) -> Vec<u8> {
    format!("GET /{path} HTTP/1.0\r\nHost: good.example\r\n\r\n").into_bytes()
}

/// Reads all there is. Returns its length.
fn drain(stream: &mut TcpStream) -> io::Result<usize> {
    let (mut count, mut buffer) = (0, vec![0; PIECE]);
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(count),
            read => count += read,
        }
    }
}

/// Sends so many bytes, says that they are all, and waits for an answer.
fn up(to: &str, bytes: usize) -> io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    let piece = vec![b'x'; PIECE];
    let mut left = bytes;
    while left > 0 {
        left -= stream.write(&piece[..left.min(PIECE)])?;
    }
    stream.shutdown(Shutdown::Write)?;
    assert_ne!(drain(&mut stream)?, 0, "nothing comes back");
    Ok(())
}

fn down(to: &str, bytes: usize) -> io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.write_all(&request(&bytes.to_string()))?;
    let received = drain(&mut stream)?;
    assert!(received > bytes, "of {bytes} bytes, {received} came, with what is before them");
    Ok(())
}

fn ask(to: &str, times: usize) -> io::Result<()> {
    for _ in 0..times {
        let mut stream = TcpStream::connect(to)?;
        stream.write_all(&request(""))?;
        assert_ne!(drain(&mut stream)?, 0, "nothing comes back");
    }
    Ok(())
}

/// Sends datagrams, each of which is refused, as fast as it can. It goes on for ever.
fn flood(to: &str) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_nonblocking(true)?;
    println!("flooding");
    loop {
        // Most of them fail with what became of the one before.
        let _ = socket.send_to(&[b'x'; 64], to);
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    assert_ne!(stream.read(&mut [0; 4096])?, 0, "nothing comes");
    stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nthis is good.example\n")
}

fn count(mut stream: TcpStream) -> io::Result<()> {
    let count = drain(&mut stream)?;
    stream.write_all(count.to_string().as_bytes())
}

fn main() -> io::Result<()> {
    for argument in env::args().skip(1) {
        let words: Vec<&str> = argument.split(' ').collect();
        let number = || words.last().and_then(|word| word.parse().ok()).expect("a number");
        let begun = Instant::now();
        match words[..] {
            ["up", to, _] => up(to, number())?,
            ["down", to, _] => down(to, number())?,
            ["ask", to, _] => ask(to, number())?,
            ["flood", to] => flood(to)?,
            ["loopback", _] => {
                let (place, server) = serve(1, count)?;
                up(&place, number())?;
                server.join().unwrap();
            }
            ["ask-loopback", _] => {
                let (place, server) = serve(number(), answer)?;
                ask(&place, number())?;
                server.join().unwrap();
            }
            _ => panic!("{argument:?} means nothing"),
        }
        println!("{argument}: {}", begun.elapsed().as_micros());
    }
    Ok(())
}
