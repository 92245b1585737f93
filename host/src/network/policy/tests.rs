use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::*;

fn policy(mode: Mode, allow: &[&str], allow_addresses: &[&str]) -> Policy {
    let allow = allow.iter().map(|rule| rule.parse().unwrap()).collect();
    let allow_addresses = allow_addresses.iter().map(|rule| rule.parse().unwrap()).collect();
    Policy::new(Rules { mode, allow, allow_addresses }, Resolvers::new(Vec::new()))
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

const PUBLIC: &str = "93.184.215.14";

/// Decides about an address and port, found by these names.
fn decide(policy: &Policy, to: &str, found_by: &[&str]) -> Result<Decision, Denial> {
    policy.decide(to.parse().unwrap(), &names(found_by), false)
}

#[test]
fn a_name_must_be_resolved_and_allowed_and_its_port_too() {
    let policy = policy(Mode::Enforce, &["a.example", "*.b.example:443", "git.example:22 tls=false"], &[]);
    let checked = |tls, all: &[&str]| Ok(Decision::Check { tls, names: names(all) });
    for (port, found_by, expected) in [
        (443, &["a.example"][..], checked(true, &["a.example"])),
        (80, &["a.example"], checked(false, &["a.example"])),
        (22, &["a.example"], Err(Denial::NoRule)),
        (443, &["x.b.example"], checked(true, &["x.b.example"])),
        (80, &["x.b.example"], Err(Denial::NoRule)),
        (443, &["evil.example"], Err(Denial::NoRule)),
        (443, &["evil.example", "a.example"], checked(true, &["a.example"])),
        (443, &[], Err(Denial::NoName)),
        (22, &["git.example"], Ok(Decision::Connect { name: Some("git.example".into()) })),
    ] {
        assert_eq!(decide(&policy, &format!("{PUBLIC}:{port}"), found_by), expected, "{port} {found_by:?}");
    }
}

#[test]
fn no_name_leads_below_the_floor() {
    for mode in [Mode::Enforce, Mode::Audit] {
        let policy = policy(mode, &["*"], &[]);
        for address in ["10.0.0.5", "169.254.169.254", "168.63.129.16", "127.0.0.1"] {
            let denied = decide(&policy, &format!("{address}:443"), &["a.example"]).unwrap_err();
            assert!(matches!(denied, Denial::BelowFloor(_)), "{address}: {denied}");
            assert!(policy.has_address(address.parse().unwrap(), false).is_err());
        }
        let own = policy.decide(format!("{PUBLIC}:443").parse().unwrap(), &names(&["a.example"]), true);
        assert_eq!(own, Err(Denial::Own));
    }
}

#[test]
fn a_rule_about_addresses_is_the_way_through_the_floor() {
    let policy = policy(Mode::Enforce, &[], &["10.0.0.5/32:443"]);
    assert_eq!(decide(&policy, "10.0.0.5:443", &[]), Ok(Decision::Connect { name: None }));
    policy.has_address("10.0.0.5".parse().unwrap(), false).unwrap();
    for to in ["10.0.0.5:80", "10.0.0.6:443"] {
        assert!(matches!(decide(&policy, to, &[]), Err(Denial::BelowFloor(_))), "{to}");
    }
}

#[test]
fn audits_let_pass_what_no_rule_has() {
    let policy = policy(Mode::Audit, &["a.example"], &[]);
    policy.has_name("evil.example").unwrap();
    for (port, found_by) in [(443, &["evil.example"][..]), (4711, &["a.example"]), (443, &[])] {
        let name = found_by.first().map(|name| (*name).to_owned());
        let passed = Ok(if port == 443 { Decision::Listen { tls: true } } else { Decision::Connect { name } });
        assert_eq!(decide(&policy, &format!("{PUBLIC}:{port}"), found_by), passed);
    }
}

#[test]
fn only_names_of_rules_are_resolved() {
    let policy = policy(Mode::Enforce, &["a.example:22", "*.b.example"], &[]);
    for name in ["a.example", "x.b.example"] {
        policy.has_name(name).unwrap();
    }
    for (name, denied) in [
        ("b.example", Denial::NoRule),
        ("secret.a.example", Denial::NoRule),
        ("", Denial::InvalidName),
        ("a\\032b.b.example", Denial::InvalidName),
    ] {
        assert_eq!(policy.has_name(name), Err(denied), "{name}");
    }
}

/// Rules about a few names and addresses that overlap.
fn any_rules() -> impl Strategy<Value = Rules> {
    let name = select(&["*", "example", "*.example", "a.example", "*.a.example", "b.a.example"][..]);
    let end = select(&["", ":443", ":22", " tls=false", ":443 tls=false", ":22 tls=false"][..]);
    let rule = (name, end).prop_map(|(name, end)| format!("{name}{end}").parse().unwrap());
    let address = select(&["10.0.0.0/8", "10.0.0.5/32", "93.184.215.0/24", "93.184.215.14/32"][..]);
    let address_rule =
        (address, select(&[22, 443][..])).prop_map(|(base, port)| format!("{base}:{port}").parse().unwrap());
    let mode = prop_oneof![4 => Just(Mode::Enforce), 1 => Just(Mode::Audit)];
    (mode, vec(rule, 0..4), vec(address_rule, 0..3)).prop_map(|(mode, allow, allow_addresses)| Rules {
        mode,
        allow,
        allow_addresses,
    })
}

fn any_limits() -> impl Strategy<Value = Limits> {
    (vec(1..4_u32, 4), vec(1..4_u64, 3)).prop_map(|(counts, bytes)| Limits {
        connections: counts[0],
        client_connections: counts[1],
        opens: counts[2],
        queries: counts[3],
        received_bytes: bytes[0],
        sent_bytes: bytes[1],
        rate: bytes[2],
    })
}

/// Whether all that a decision permits is permitted by another one.
fn is_within(decision: &Result<Decision, Denial>, other: &Result<Decision, Denial>) -> bool {
    match (decision, other) {
        (Err(_), _) | (Ok(_), Ok(Decision::Connect { .. } | Decision::Listen { .. })) => true,
        (Ok(Decision::Check { tls, names }), Ok(Decision::Check { tls: other, names: others })) => {
            tls == other && names.is_subset(others)
        }
        (Ok(_), _) => false,
    }
}

const NAMES: [&str; 5] = ["example", "a.example", "b.a.example", "c.example", "other"];
const ADDRESSES: [&str; 4] = ["10.0.0.5", "10.1.0.0", "93.184.215.14", "93.184.215.15"];

proptest! {
    #[test]
    fn narrower_policies_allow_nothing_that_the_wider_ones_deny(
        all in any_rules(),
        clients in option::of(any_rules()),
        requests in option::of(any_rules()),
        limits in (any_limits(), any_limits()),
        found_by in subsequence(&NAMES[..], 0..3),
        to in (select(&ADDRESSES[..]), select(&[22, 80, 443][..])),
        is_own: bool,
    ) {
        let all = Policy { limits: limits.0, ..Policy::new(all, Resolvers::new(Vec::new())) };
        let clients = all.narrowed(clients, limits.1);
        let requests = clients.narrowed(requests, Limits::default());
        let to = SocketAddr::new(to.0.parse().unwrap(), to.1);
        let names = names(&found_by);
        for (wide, narrow) in [(&all, &clients), (&clients, &requests)] {
            let decided = (narrow.decide(to, &names, is_own), wide.decide(to, &names, is_own));
            prop_assert!(is_within(&decided.0, &decided.1), "{decided:?}");
            for name in NAMES {
                prop_assert!(wide.has_name(name).is_ok() || narrow.has_name(name).is_err(), "{name}");
            }
            let has = [wide, narrow].map(|policy| policy.has_address(to.ip(), is_own).is_ok());
            prop_assert!(has[0] || !has[1]);
            prop_assert_eq!(narrow.limits.least(wide.limits), narrow.limits);
        }
    }

    #[test]
    fn a_covered_rule_is_one_whose_connections_are_all_allowed(
        all in any_rules(),
        own in any_rules(),
        name in select(&NAMES[..]),
        to in (select(&ADDRESSES[..]), select(&[22, 80, 443][..])),
    ) {
        let policy = |rules| Policy::new(rules, Resolvers::new(Vec::new()));
        let own = Rules { mode: Mode::Enforce, ..own };
        let (all, names) = (policy(all), names(&[name]));
        let covered = Rules {
            mode: Mode::Enforce,
            allow: own.allow.into_iter().filter(|rule| all.covers(rule)).collect(),
            allow_addresses: own.allow_addresses.into_iter().filter(|rule| all.covers_address(rule)).collect(),
        };
        let to = SocketAddr::new(to.0.parse().unwrap(), to.1);
        let decided = (policy(covered).decide(to, &names, false), all.decide(to, &names, false));
        prop_assert!(is_within(&decided.0, &decided.1), "{decided:?}");
    }
}

#[test]
fn denied_addresses_and_ipv6_without_it_are_reached_by_no_rule() {
    let open = policy(Mode::Audit, &["*"], &["93.184.215.14/32:443", "[2606:2800::]/32:443"]);
    let denied = ["93.184.215.0/24", "2606:2800:21f::/48"].map(|prefix| prefix.parse().unwrap()).to_vec();
    let deny = Policy { deny_addresses: denied, nat64: true, ..open.clone() };
    for (policy, to, expected) in [
        (&deny, "93.184.215.14:443", Err(Denial::DenyListed)),
        (&deny, "[2606:2800:21f::14]:443", Err(Denial::DenyListed)),
        (&deny, "[64:ff9b::93.184.215.14]:443", Err(Denial::DenyListed)),
        (&deny, "93.184.216.14:443", Ok(())),
        (&Policy { ipv6: false, ..open.clone() }, "[2606:2800:21f::14]:443", Err(Denial::Ipv6)),
        (&open, "[2606:2800:21f::14]:443", Ok(())),
    ] {
        assert_eq!(decide(policy, to, &["a.example"]).map(drop), expected, "{to}");
        let address: SocketAddr = to.parse().unwrap();
        assert_eq!(policy.has_address(address.ip(), false), expected, "{to}");
    }
}

#[test]
fn a_client_gets_what_both_its_rules_and_those_of_all_allow() {
    let all = policy(Mode::Enforce, &["a.example", "b.example", "git.example:22 tls=false"], &["10.0.0.0/8:443"]);
    let rules = Rules {
        allow: vec!["a.example:443".parse().unwrap(), "git.example:22".parse().unwrap()],
        allow_addresses: vec!["10.0.0.5/32:443".parse().unwrap()],
        ..Rules::default()
    };
    let client = all.narrowed(Some(rules), Limits { connections: 5, ..Limits::default() });
    assert_eq!(client.limits, Limits { connections: 5, ..Limits::default() });
    assert_eq!((client.has_name("a.example"), client.has_name("b.example")), (Ok(()), Err(Denial::Narrowed)));
    let checked = |name: &str| Ok(Decision::Check { tls: true, names: names(&[name]) });
    for (to, found_by, expected) in [
        (format!("{PUBLIC}:443"), &["a.example"][..], checked("a.example")),
        (format!("{PUBLIC}:443"), &["a.example", "b.example"], checked("a.example")),
        (format!("{PUBLIC}:80"), &["a.example"], Err(Denial::Narrowed)),
        (format!("{PUBLIC}:443"), &["b.example"], Err(Denial::Narrowed)),
        (format!("{PUBLIC}:22"), &["a.example"], Err(Denial::NoRule)),
        // The client's rule wants TLS.
        (format!("{PUBLIC}:22"), &["git.example"], checked("git.example")),
        ("10.0.0.5:443".into(), &[], Ok(Decision::Connect { name: None })),
        ("10.0.0.6:443".into(), &[], Err(Denial::BelowFloor("private"))),
    ] {
        assert_eq!(decide(&client, &to, found_by), expected, "{to} {found_by:?}");
    }
    decide(&all.narrowed(None, all.limits), &format!("{PUBLIC}:80"), &["b.example"]).unwrap();
}

#[test]
fn a_rule_is_covered_only_by_one_that_allows_as_much() {
    let all = policy(Mode::Enforce, &["*.example", "b:443 tls=false", "c:80", "c:443"], &["10.0.0.0/8:443"]);
    for (rule, is_covered) in [
        ("a.example", true),
        ("a.example:80", true),
        ("*.a.example", true),
        ("*.example", true),
        ("c", true),
        ("b:443", true),
        ("b:443 tls=false", true),
        ("example", false),
        ("*", false),
        ("*.aexample", false),
        ("a.example:22", false),
        ("a.example tls=false", false),
        ("b", false),
    ] {
        assert_eq!(all.covers(&rule.parse().unwrap()), is_covered, "{rule}");
    }
    for (rule, is_covered) in [
        ("10.0.0.0/8:443", true),
        ("10.1.0.0/16:443", true),
        ("0.0.0.0/0:443", false),
        ("11.0.0.0/8:443", false),
        ("10.0.0.0/8:80", false),
        ("[fd12::]/16:443", false),
    ] {
        assert_eq!(all.covers_address(&rule.parse().unwrap()), is_covered, "{rule}");
    }
    let audit = policy(Mode::Audit, &[], &[]);
    assert!(audit.covers(&"*:22 tls=false".parse().unwrap()));
    assert!(!audit.covers_address(&"10.0.0.5/32:443".parse().unwrap()));
}
