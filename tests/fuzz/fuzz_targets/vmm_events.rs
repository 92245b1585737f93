//! Fuzzes the decoder of the event stream of a VMM.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::vmm_events(bytes);
});
