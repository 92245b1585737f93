use super::*;
use crate::daemon::problem::failure;

fn limits(text: &str) -> String {
    let config = Config::of(text);
    let mut checks = Checks { config: &config, problems: Vec::new() };
    let footprint = Footprint::smallest();
    checks.limits(&config.options(footprint).limits, footprint);
    checks.standby(&config.options(footprint).limits, footprint);
    checks.host_paths();
    let tenants = checks.tenants();
    checks.nix();
    checks.nix_cache(&tenants);
    checks.listen();
    checks.web();
    checks.disk();
    checks.collection();
    checks.network();
    failure(checks.problems).message
}

#[test]
fn limits_fit_the_budget_and_the_budget_fits_the_host() {
    let nothing = failure(Vec::new()).message;
    assert_eq!(limits("[build]\nmemory = '256M'"), nothing);
    for (text, words) in [
        ("[build]\nmemory = '1K'", "test.toml:2: build.memory = '1K': must be from 128.00 MiB to"),
        ("[budget]\nmemory = '1G'\n[build]\nmemory = '2G'", "build.memory = '2G': must be from 128.00 MiB to 42"),
        ("[budget]\nmemory = '1000T'", "test.toml:2: budget.memory = '1000T': must be from"),
        ("[budget]\nmemory = '1M'", "test.toml:2: budget.memory = '1M': must be from"),
        ("[budget]\ncpus = 2\n[build]\ncpus = 3", "test.toml:4: build.cpus = 3: must be from 1 to 2"),
        ("[budget]\ncpus = 1000\n[build]\ncpus = 255", "build.cpus = 255: must be from 1 to 254"),
        (
            "[budget]\nmemory = '1G'\n[standby]\nmachines = 1\nmemory = '2G'",
            "test.toml:5: standby.memory = '2G': must be from",
        ),
        ("[gc]\nkeep = '1h'\nlow_keep = '2h'", "test.toml:3: gc.low_keep = '2h': must be at most gc.keep"),
        (
            "[gc]\n[store]\nblob_service_addr = 'memory://'",
            "must be left out: garbage is collected only in a store with addresses",
        ),
        ("[nix]\nkeep_alive = '1ms'", "test.toml:2: nix.keep_alive = '1ms': must be at least 1 second"),
        ("[nix.impure_env]\n'a=b' = ''", "nix.impure_env.\"a=b\" = '': must have a name without = and NUL"),
        ("[nix]\nimpure_env = { a = \"\\u0000\" }", "must have a value without NUL"),
        ("[disk]\nmin_free = '1000T'", "test.toml:2: disk.min_free = '1000T': must be less than"),
        ("[standby]\nmachines = 1\nmemory = '64M'", "test.toml:3: standby.memory = '64M': must be from"),
        ("[standby]\nmachines = 1\nage = '1s'", "test.toml:3: standby.age = '1s': must be at least 60 seconds"),
        ("[build]\nscratch_size = '1000T'", "build.scratch_size = '1000T': must be from"),
        ("hugepages = true\n[build]\nmemory = '100G'", "test.toml:1: hugepages = true: a machine's 106.41 GiB take"),
        (
            "[operators]\nusers = ['root', 'no one']",
            "test.toml:2: operators.users = 'no one': this host has no user of",
        ),
        (
            "[operators]\n[tenants.'user:root']\n[tenants.'user:no one']",
            "test.toml:3: tenants.\"user:no one\": this host has no user of that name",
        ),
        (
            "[tenants]\n'user:0' = { share = 2 }\n'user:root' = {}",
            "test.toml:3: tenants.\"user:root\" = {}: this user has another table, by name or number; keep one of them",
        ),
        (
            "[tenants.'user:root']\nrecords = 0\ndisk = '1M'",
            "test.toml:3: tenants.\"user:root\".disk = '1M': must be at least ",
        ),
        ("[operators]\nusers = [0,\n-1]", "test.toml:3: operators.users = -1: this host has no user of that name"),
        (
            "withhold_network = true\n[network]\nresolvers = ['10.0.0.53:53']",
            "test.toml:1: withhold_network = true: must be false where there is a table [network]",
        ),
        (
            "[network]\nresolvers = ['10.0.0.53:53']\nconnections = 513",
            "test.toml:3: network.connections = 513: must be at most 512",
        ),
        (
            "[network]\nresolvers = ['10.0.0.53:53']\nallow = ['*.example']\n[network.clients.'user:1']\nallow = ['a.example', 'example']",
            "test.toml:5: network.clients.\"user:1\".allow = 'example': must not allow more than a rule in network.allow does",
        ),
        (
            "[network]\nresolvers = ['10.0.0.53:53']\n[network.clients.'user:1']\nallow_addresses = ['10.0.0.5/32:443']",
            "test.toml:4: network.clients.\"user:1\".allow_addresses = '10.0.0.5/32:443': must not allow more than a rule in",
        ),
        (
            "[network]\nresolvers = ['10.0.0.53:53']\n[network.clients.'user:1']\nconnections = 129",
            "test.toml:4: network.clients.\"user:1\".connections = 129: must be at most 128, as network.connections says",
        ),
        (
            "[network]\nresolvers = ['10.0.0.53:53']\nsent = '1M'\n[network.clients.'user:1']\nsent = '2M'",
            "test.toml:5: network.clients.\"user:1\".sent = '2M': must be at most 1.00 MiB, as network.sent says",
        ),
        (
            "[network]\nresolvers = ['10.0.0.53:53']\nrate = '1M'\n[network.clients.'user:1']\nrate = 0",
            "test.toml:5: network.clients.\"user:1\".rate = 0: must be at most 1.00 MiB, as network.rate says",
        ),
        (
            "[network]\nresolvers = ['10.0.0.53:53']\nca_file = '/dev/null'",
            "test.toml:3: network.ca_file = '/dev/null': holds no certificate in PEM",
        ),
        (
            "[network]\nresolvers = ['10.0.0.53:53']\nupstream_proxy = 'http://10.0.0.5:3128'",
            "test.toml:2: network.resolvers = ['10.0.0.53:53']: must be empty where network.upstream_proxy is set",
        ),
        (
            "[nix.cache]\nlisten = '[::]:80'\npublic = 'key:ci'",
            "test.toml:2: nix.cache.listen = '[::]:80': must be a loopback address: paths and tokens aren't encrypted",
        ),
        (
            "[nix.cache]\nlisten = '127.0.0.1:80'",
            "test.toml:1: nix.cache: needs public or tokens: nobody could read anything",
        ),
        (
            "[nix.cache]\nlisten = '[::1]:80'\n[nix.cache.tokens]\n'key:a' = 'DIGEST'\n'key:b' = 'DIGEST'",
            "test.toml:5: nix.cache.tokens.\"key:b\" = 'DIGEST': must have another token than key:a",
        ),
        (
            "[nix.cache]\nlisten = '[::1]:80'\n[nix.cache.tokens]\n'key:a' = 'DIGEST'\n[tenants.'key:b']",
            "test.toml:4: nix.cache.tokens.\"key:a\" = 'DIGEST': is no tenant: to admit it, write [tenants.\"key:a\"]",
        ),
        ("[host_paths]\n'/x' = '/nowhere'", "test.toml:2: host_paths.\"/x\" = '/nowhere': can't be read"),
    ] {
        let [text, words] = [text, words].map(|text| text.replace("DIGEST", &"0f".repeat(32)));
        let message = limits(&text);
        assert!(message.contains(&words), "{text}: {message}");
    }
    let open = "no client has to prove who it is";
    let mutual = "[tls]\ncertificate = 'c'\nkey = 'k'\nclient_ca = 'a'";
    for (text, words) in [
        ("listen = ['/x', '[::]:1']", "test.toml:1: listen = '[::]:1': anyone who reaches [::]:1 could use it"),
        ("listen = ['0.0.0.0:1']\n[tls]\ncertificate = 'c'\nkey = 'k'", open),
        ("[web]\nlisten = '0.0.0.0:1'", "test.toml:2: web.listen = '0.0.0.0:1': must be a loopback address where"),
        ("listen = ['a..b:1']", "listen = 'a..b:1': can't be resolved"),
    ] {
        let message = limits(text);
        assert!(message.contains(words), "{text}: {message}");
    }
    for text in [
        "listen = ['/x', '127.0.0.1:1', '[::1]:1', 'localhost:1']",
        "[operators]\nusers = ['root', 'nobody', 1000, '1001']",
        "allow_anonymous_tcp = true\nlisten = ['[::]:1']",
        "[web]\nlisten = '[::1]:1'",
        "[web]\nlisten = '0.0.0.0:1'\n[tls]\ncertificate = 'c'\nkey = 'k'",
        &format!("listen = ['[::]:1']\n{mutual}"),
        // Who may connect shows when the table can be read.
        "listen = ['[::]:1']\n[tls]\ncertificate = 'c'\nkey = 'k'\nclientca = 'a'",
    ] {
        assert_eq!(limits(text), nothing, "{text}");
    }
    // Where the budget can't be read, nothing is held against it.
    let unread = limits("[budget]\ncpus = 'two'\n[build]\ncpus = 200");
    assert_eq!(unread, nothing);
}

#[test]
fn a_stock_beyond_the_budget_is_reduced_with_a_word() {
    let reduced = |text: &str| {
        let (config, footprint) = (Config::of(text), Footprint::smallest());
        config.standby_beyond_budget(&config.options(footprint).limits, footprint)
    };
    let builds = |builds: u32| {
        format!("[budget]\nbuilds = {builds}\ncpus = 8\nmemory = '4G'\n[build]\nmemory = '256M'\ncpus = 1\n")
    };
    let standby = |machines: u32| format!("[standby]\nmachines = {machines}");
    assert_eq!(reduced(&(builds(3) + &standby(3))), None);
    assert_eq!(reduced(&builds(1)), None);
    let said = reduced(&(builds(2) + &standby(3))).unwrap();
    assert_eq!(
        said,
        "the budget has room for 2 standby machines of the usual size, and not for [standby] machines = 3"
    );
    let said = reduced(&(builds(100) + &standby(100))).unwrap();
    assert!(said.contains("room for 3 standby"), "its memory, {said}");
}
