use super::*;
use crate::{
    daemon::problem::failure,
    machine::jail::{DiskRates, Shares},
};

fn config(text: &str) -> Config {
    Config::from_source(Source::of(text)).unwrap()
}

/// What is said of the settings that can't be read.
fn unread(text: &str) -> String {
    match Config::from_source(Source::of(text)) {
        Ok(config) => failure(config.unread().cloned().collect()).message,
        Err(failure) => failure.message,
    }
}

#[test]
fn a_whole_configuration_is_read() {
    let text = r#"
        listen = ["/run/x", "[::1]:8000", "localhost:8000"]
        socket_mode = 0o660
        allow_emulation = true
        drain_timeout = "1m"
        vmm = "cloud-hypervisor"
        [tls]
        certificate = "c"
        key = "k"
        client_ca = "a"
        [budget]
        memory = "8G"
        cpus = 16
        builds = 4
        [queue]
        max = 10
        [build]
        memory = 1073741824
        cpus = 4
        timeout = "2h"
        [cgroups]
        cpu_percent = 200
        write_rate = "1M"
    "#;
    let config = config(text);
    assert_eq!(config.unread().count(), 0);
    let limits = config.options(Footprint::smallest()).limits;
    assert_eq!((limits.memory_bytes, limits.cpus), (1 << 30, 4));
    assert_eq!(limits.timeout, Duration::from_secs(7200));
    assert_eq!(config.budget(), Budget { memory_bytes: 8 << 30, cpus: 16, builds: 4 });
    assert_eq!((config.bounds().queued, config.socket_mode.0), (10, 0o660));
    let rates = DiskRates { path: "/disk".into(), read: None, write: Some(1 << 20) };
    let shares = Shares { cpu_percent: 200, disk_rates: Some(rates), ..Shares::default() };
    assert_eq!(config.cgroups.shares(Path::new("/disk")), shares);
    assert_eq!(config.cgroups.controllers().collect::<Vec<_>>(), [("cpu_percent", "cpu")]);
}

#[test]
fn a_wrong_value_is_reported_with_line_and_key() {
    for (text, words) in [
        ("colour = 'red'", "test.toml:1: colour = 'red': unknown field `colour`"),
        ("\n[build]\nmemory = 'lots'", "test.toml:3: build.memory = 'lots': \"lots\" is not a size"),
        ("[build]\ntimeout = 90", "test.toml:2: build.timeout = 90: \"90\" is not a time with its unit"),
        ("[budget]\ncpus = 0", "test.toml:2: budget.cpus = 0: \"0\" is not a number greater than 0: must not be 0"),
        ("[budget]\ncpus = -1", "budget.cpus = -1: \"-1\" is not a number greater than 0: invalid digit"),
        ("socket_mode = 0o777", "test.toml:1: socket_mode = 0o777: 0o777 is not a mode for a socket: write 0o600"),
        ("[cgroups]\ncpu_weight = 0", "test.toml:2: cgroups.cpu_weight = 0: 0 is not a weight: write 1 to 10000"),
        ("[cgroups]\nio_weight = 10001", "cgroups.io_weight = 10001: 10001 is not a weight: write 1 to 10000"),
        ("[cgroups]\ncpu_percent = 0", "cgroups.cpu_percent = 0: 0 is not a percentage: write 1 to 10000"),
        ("[cgroups]\nprocesses = 9", "cgroups.processes = 9: 9 doesn't fit: write 64 to 4194304"),
        ("[cgroups]\nread_rate = 0", "cgroups.read_rate = 0: \"0\" is not a size, such as \"2G\": must not be 0"),
        (
            "[network]\nallow = ['a.example',\n'https://a.example']",
            "test.toml:3: network.allow = 'https://a.example': \"https://a.example\" is not a rule about names: must be NAME",
        ),
        (
            "[network]\nallow_addresses = ['10.0.0.5:443']",
            "test.toml:2: network.allow_addresses = '10.0.0.5:443': \"10.0.0.5:443\" is not a rule about addresses: must be",
        ),
        (
            "[network]\nresolvers = ['10.0.0.53']",
            "test.toml:2: network.resolvers = '10.0.0.53': invalid socket address",
        ),
        ("[network]\nmode = 'off'", "test.toml:2: network.mode = 'off': unknown variant `off`, expected `enforce`"),
        (
            "[network]\nupstream_proxy = 'http://user:secret@a.example'",
            "test.toml:2: network.upstream_proxy = 'http://…@a.example': must be http://HOST:PORT or http://USER:PASSWORD@HOST:PORT",
        ),
        (
            "[network]\nproxy = 'http://u:secret@a:1'",
            "test.toml:2: network.proxy = 'http://…@a:1': unknown field `proxy`",
        ),
        (
            "[network]\nupstream_proxy = ['http://u:secret@a:1']",
            "test.toml:2: network.upstream_proxy = ['http://…@a:1']: ",
        ),
        (
            "[network]\nipv6 = true",
            "test.toml:2: network.ipv6 = true: invalid value: boolean `true`, expected \"auto\" or false",
        ),
        ("[network]\nipv6 = 'on'", "invalid value: string \"on\", expected \"auto\" or false"),
        (
            "[network]\ndeny_addresses = ['45.33.32.1']",
            "test.toml:2: network.deny_addresses = '45.33.32.1': \"45.33.32.1\" is not a range of addresses: must be ADDRESS/PREFIX",
        ),
        (
            "[network]\nallow_addresses = ['[::ffff:10.0.0.5]/128:443']",
            "an IPv4 address is written as such, as in 10.0.0.5",
        ),
        (
            "[network]\nrate = '1K'",
            "test.toml:2: network.rate = '1K': \"1K\" is not a size for a second, such as \"10M\", or 0 for no limit: must be at \
             least 64.00 KiB",
        ),
        (
            "[network.clients.'uid:1']\nallow = []",
            "test.toml:1: network.clients.\"uid:1\": \"uid:1\" is not a client: must be user:UID",
        ),
        (
            "[network.clients.'user:01']\nallow = []",
            "test.toml:1: network.clients.\"user:01\": \"user:01\" must be written \"user:1\"",
        ),
        (
            "[network.clients.'user:1']\nallow = ['a..b']",
            "test.toml:2: network.clients.\"user:1\".allow = 'a..b': \"a..b\" is not a rule about names: must be NAME",
        ),
        (
            "[network.clients.'user:1']\nmode = 'audit'",
            "test.toml:2: network.clients.\"user:1\".mode = 'audit': unknown field `mode`",
        ),
        ("listen = ['run/x']", "test.toml:1: listen = 'run/x': \"run/x\" is not an address to listen on"),
        ("listen = ['host']", "listen = 'host': \"host\" is not an address to listen on"),
        ("listen = ['::1:99999']", "listen = '::1:99999': \"::1:99999\" is not an address to listen on"),
        ("listen = [':80']", "listen = ':80': \":80\" is not an address to listen on"),
        ("[traces]\nendpoint = 'localhost:4317'", "test.toml:2: traces.endpoint = 'localhost:4317': "),
        ("[traces]\nendpoint = 'https://localhost:4317'", "write http://HOST:PORT"),
        (
            "[operators]\nusers = [true]",
            "test.toml:2: operators.users = true: invalid type: boolean `true`, expected a user",
        ),
        ("[operators]\nuser = []", "test.toml:2: operators.user = []: unknown field `user`, expected `users`"),
        (
            "[operators]\ncertificates = ['user:1']",
            "test.toml:2: operators.certificates = ['user:1']: \"user:1\" names no certificate: write uri:NAME, dns:NAME or",
        ),
        ("[tenants.'1001']\nshare = 2", "test.toml:1: tenants.1001: \"1001\" fits no client: must be user:UID"),
        (
            "[tenants]\n'user:al*' = { share = 2 }",
            "test.toml:2: tenants.\"user:al*\" = { share = 2 }: \"user:al*\" fits no client: no client's name begins with this",
        ),
        (
            "[tenants.'dns:A.example']",
            "test.toml:1: tenants.\"dns:A.example\": \"dns:A.example\" fits no client: must be written \"dns:a.example\"",
        ),
        ("[tenants.'user:1']\n[tenants.'user:1']", "test.toml:2: duplicate key"),
        (
            "[tenants.'user:1']\nshare = 0",
            "test.toml:2: tenants.\"user:1\".share = 0: 0 is not a weight: write 1 to 10000",
        ),
        ("[tenants.'user:1']\ndisk = 'much'", "test.toml:2: tenants.\"user:1\".disk = 'much': "),
        (
            "[tenants.'user:1']\nweight = 1",
            "test.toml:2: tenants.\"user:1\".weight = 1: unknown field `weight`, expected one of `share`, `running`, `queued`",
        ),
        (
            "[store]\nisolation = 'users'",
            "test.toml:2: store.isolation = 'users': unknown variant `users`, expected `none` or `tenants`",
        ),
        (
            "[store]\nshared = ['debian']",
            "test.toml:2: store.shared = ['debian']: \"debian\" names no root: write roots/NAME, with a name",
        ),
        ("[store]\nshared = ['roots/a/b']", "test.toml:2: store.shared = ['roots/a/b']: \"roots/a/b\" names no root"),
        ("vmm = 'firecracker'", "vmm = 'firecracker': unknown variant `firecracker`, expected `cloud-hypervisor`"),
        ("[metrics]\nlisten = 'here'", "test.toml:2: metrics.listen = 'here': invalid socket address"),
        ("\n[tls]\nkey = 'k'", "test.toml:2: tls: missing field `certificate`"),
        ("tls = { key = 'k' }", "test.toml:1: tls = { key = 'k' }: missing field `certificate`"),
        ("tls.key = 'k'", "test.toml:1: tls: missing field `certificate`"),
        ("[host_paths]\n'/dev/kvm' = '/x'", "test.toml:2: host_paths.\"/dev/kvm\" = '/x': the path \"/dev/kvm\" is in"),
        ("listen = [", "test.toml:1: unclosed array"),
        ("image = 1\nimage = 2", "test.toml:2: duplicate key"),
    ] {
        let message = unread(text);
        assert!(message.contains(words) && !message.contains("secret"), "{text}: {message}");
    }
}

#[test]
fn every_value_that_does_not_fit_is_reported() {
    let text = "\
        colour = 'red'\n\
        listen = [\n\
        '/run/x',\n\
        'here',\n\
        'there',\n\
        ]\n\
        [build]\n\
        memory = 'lots'\n\
        cpus = 2\n\
        timeout = 90\n\
        [tls]\n\
        key = 'k'\n";
    let places = ["1: colour", "4: listen = 'here'", "5: listen = 'there'", "8: build.memory", "10: build.timeout"];
    let message = unread(text);
    for place in places.into_iter().chain(["11: tls: missing"]) {
        assert_eq!(message.matches(&format!("test.toml:{place}")).count(), 1, "{place}: {message}");
    }
    assert_eq!(message.matches("test.toml").count(), 6, "{message}");
    // The others are read all the same.
    let config = config(text);
    assert_eq!((config.listen.len(), config.options(Footprint::smallest()).limits.cpus), (1, 2));
    assert!(config.is_read("budget") && !config.is_read("tls") && !config.is_read("build"));
    let flood: String = (0..200).map(|number| format!("key_{number} = 1\n")).collect();
    assert_eq!(unread(&flood).matches("test.toml").count(), 51, "the rest can wait");
    assert_eq!(unread("a = \nb = \n").matches("test.toml").count(), 2, "of what is no TOML, too");
}

#[test]
fn flags_hide_what_the_file_says() {
    let mut config =
        config("listen = ['here']\n[store]\nblob_service_addr = '/file'\ndirectory_service_addr = '/file'");
    assert_eq!(config.unread().count(), 1);
    let store = StoreAddrs { blobs: Some("flag".to_owned()), directories: Some(String::new()) };
    config.override_with(Overrides { listen: vec!["/run/x".parse().unwrap()], store, ..Overrides::default() });
    assert_eq!(config.unread().count(), 0);
    assert_eq!(config.place(&"store.blob_service_addr".into()).text, "store.blob_service_addr");
    let quoted = config.place(&"store.directory_service_addr".into()).text;
    assert_eq!(quoted, "test.toml:4: store.directory_service_addr = '/file'");
    assert_eq!(
        config.store.addrs,
        StoreAddrs { blobs: Some("flag".to_owned()), directories: Some("/file".to_owned()) }
    );
}

#[test]
fn every_setting_of_the_documented_example_exists() {
    let document = include_str!("../../../../docs/daemon.md");
    let (_, example) = document.split_once("```toml\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    // Those that stand behind a `#` as well.
    let example: String =
        example.lines().map(|line| line.strip_prefix("# ").unwrap_or(line).to_owned() + "\n").collect();
    assert_eq!(config(&example).unread().count(), 0, "{}", unread(&example));
}
