//! Builds whose connections have a rate: they get the same as without, and the same is on record.

use cofferdam_tests::{Cofferdam, Daemon, Lab, RESOLVER, guest};

const LAB: &str = env!("CARGO_BIN_EXE_network-lab");

/// All servers of the lab.
const SERVER: &str = "93.184.215.14";

#[test]
fn connections_at_a_rate_carry_and_record_the_same() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let rules = [7, 9, 10, 11, 13, 80].map(|port| format!("\"{SERVER}/32:{port}\"")).join(", ");
    // A second's worth is less than is carried.
    let config =
        format!("[network]\nrate = \"4M\"\nallow_addresses = [{rules}]\nallow = []\nresolvers = [\"{RESOLVER}\"]\n");
    let daemon = Daemon::start(&cofferdam, &config);
    let client = Cofferdam::new();
    let steps = [
        (format!("count {SERVER}:80 nobody /8388608"), "8388608"),
        (format!("upload {SERVER}:7 5000000"), "got 5000000 bytes"),
        (format!("http {SERVER}:9 nobody"), "reset"),
        (format!("count {SERVER}:10 nobody /"), "reset"),
        (format!("speak-last {SERVER}:11 1000000"), "over"),
        (format!("listen {SERVER}:13"), "heard 1000000 bytes"),
        (format!("http-many {SERVER}:80 nobody 200"), "200"),
    ];
    let quoted: Vec<_> = steps.iter().map(|(step, _)| format!("'{step}'")).collect();
    let build = client.build().on(&daemon).switch("--network").input("client", guest::client());
    let outcome = build.shell(&format!("/inputs/client {}", quoted.join(" "))).succeeds();
    for (step, answer) in &steps {
        assert!(outcome.stderr.lines().any(|line| line == format!("{step}: {answer}")), "{step}: {outcome}");
    }

    let id = outcome.build_id().expect("a daemon names its builds");
    let shown = client.command(["builds", "show", &id, "--json", "--daemon", &daemon.addr()]).succeeds().json();
    let connections = shown["connections"].as_array().expect("it had some");
    let carried = |port: u16| {
        let of_port = connections.iter().filter(|one| one["address"] == format!("{SERVER}:{port}"));
        of_port.map(|one| (one["sent"].as_u64().unwrap(), one["received"].as_u64().unwrap())).collect::<Vec<_>>()
    };
    let request = "GET /8388608 HTTP/1.0\r\nHost: nobody\r\n\r\n".len() as u64;
    let head = "HTTP/1.0 200 OK\r\n\r\n".len() as u64;
    // The end of a stream counts as a byte.
    assert!(carried(80).contains(&(request, head + 8_388_608 + 1)), "{shown}");
    assert_eq!(carried(80).len(), 201, "{shown}");
    assert_eq!(carried(7), [(5_000_000, "got 5000000 bytes".len() as u64 + 1)], "{shown}");
    assert_eq!(carried(11), [(1_000_000, "over\r\n".len() as u64 + 1)], "{shown}");
    assert!(connections.iter().all(|one| one["verdict"] == "allowed"), "{shown}");
    daemon.end().succeeds();
}
