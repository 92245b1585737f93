//! A static program for the inside of guests: does what their shell can't.

use std::{env, fs, os::unix::net::UnixListener, process, thread};

fn main() {
    let arguments: Vec<String> = env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // As the first program of a guest: one that never calls anybody.
        ["/init", ..] => loop {
            thread::park();
        },
        [_, "copy", from, to] => fs::write(to, fs::read(from).unwrap()).unwrap(),
        [_, "socket", path] => drop(UnixListener::bind(path).unwrap()),
        _ => {
            eprintln!("probe: {arguments:?} means nothing");
            process::exit(64);
        }
    }
}
