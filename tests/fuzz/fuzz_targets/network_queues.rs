//! Fuzzes the network device with a guest whose memory and queues are made up.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::network::queues(bytes);
});
