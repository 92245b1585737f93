//! Fuzzes the decoder of what the network device asks of the host.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::network::request(bytes);
});
