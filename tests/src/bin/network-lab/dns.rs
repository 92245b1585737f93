//! The internet's DNS server.

use std::{
    fs::File,
    io::Write as _,
    net::{IpAddr, UdpSocket},
    path::Path,
    thread,
};

use anyhow::Context as _;

/// Names and their addresses. The second addresses of `turns.example` are for later queries.
const NAMES: &[(&str, &[&str])] = &[
    ("good.example", &["93.184.215.14", "2606:2800:21f::14"]),
    ("other.example", &["93.184.215.14"]),
    ("evil.example", &["93.184.215.15"]),
    ("private.example", &["10.0.0.5"]),
    ("metadata.example", &["169.254.169.254", "64:ff9b::a9fe:a9fe"]),
    ("own.example", &["45.33.32.1", "45.33.33.2", "2606:2801::7"]),
    ("turns.example", &["93.184.215.15", "10.0.0.5"]),
    ("dead.example", &["93.184.215.14", "2606:2802::14"]),
    // Its second address has no route.
    ("half.example", &["93.184.215.14", "2001:4860::1"]),
    ("nobody.example", &["93.184.215.99"]),
    ("*.many.example", &["93.184.215.14"]),
];

const A: u16 = 1;
const AAAA: u16 = 28;

pub(crate) fn start(log: &Path) -> anyhow::Result<()> {
    let mut log = File::options().create(true).append(true).open(log).context("the log can't be opened")?;
    let socket = UdpSocket::bind("10.0.0.53:53").context("the DNS server")?;
    thread::spawn(move || {
        let (mut buffer, mut turns) = ([0; 4096], 0);
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let Some((name, kind, end)) = question(&buffer[..length]) else { continue };
            let _ = log.write_all(format!("dns {name} {kind}\n").as_bytes());
            let found = NAMES
                .iter()
                .find(|(known, _)| known.strip_prefix('*').map_or(*known == name, |suffix| name.ends_with(suffix)));
            let all = found.iter().flat_map(|(_, addresses)| addresses.iter());
            let all = all.map(|address| address.parse::<IpAddr>().expect("they are constants"));
            let mut addresses: Vec<_> =
                all.filter(|address| kind == if address.is_ipv4() { A } else { AAAA }).collect();
            if name == "turns.example" && kind == A {
                addresses = vec![addresses[turns.min(1)]];
                turns += 1;
            }
            let answer = answer(&buffer[..end], kind, found.is_some(), &addresses);
            let _ = socket.send_to(&answer, from);
        }
    });
    Ok(())
}

/// The first address of a name.
pub(crate) fn address(name: &str) -> Option<IpAddr> {
    let (_, addresses) = NAMES.iter().find(|(known, _)| *known == name)?;
    addresses.first()?.parse().ok()
}

/// The name and the type that a query asks for, and where its question ends.
fn question(query: &[u8]) -> Option<(String, u16, usize)> {
    let (mut labels, mut at) = (Vec::new(), 12);
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).into_owned());
        at += length;
    }
    let kind = u16::from_be_bytes([*query.get(at)?, *query.get(at + 1)?]);
    Some((labels.join("."), kind, at + 4))
}

fn answer(query: &[u8], kind: u16, exists: bool, addresses: &[IpAddr]) -> Vec<u8> {
    let code = if exists { 0 } else { 3 };
    let mut answer =
        [&query[..2], &[0x81, 0x80 | code, 0, 1, 0, addresses.len() as u8, 0, 0, 0, 0], &query[12..]].concat();
    for address in addresses {
        let data = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        answer.extend([0xc0, 12, 0, kind as u8, 0, 1, 0, 0, 0, 60, 0, data.len() as u8]);
        answer.extend(data);
    }
    answer
}
