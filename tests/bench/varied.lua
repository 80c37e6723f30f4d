-- Gives each request a target and fields of its own; wrk runs it.
local count = 0

function request()
  count = count + 1
  wrk.headers["Cookie"] = "session=8c5f2b1d9e7a4c60b3f1; seen=" .. count
  wrk.headers["X-Request-Id"] = tostring(count)
  return wrk.format("GET", wrk.path .. "?page=" .. count)
end
