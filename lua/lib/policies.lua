-- policies: those that a pool may be told to choose by, each a file in policies/. Whoever adds one adds its line here.
local POLICIES = {
  round_robin = round_robin,
  random = random,
  minimum_requests = minimum_requests,
  minimum_tokens = minimum_tokens,
  power_of_two = power_of_two,
  envelope = envelope,
  cost_envelope = cost_envelope,
  pending_envelope = pending_envelope,
}
