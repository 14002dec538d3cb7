-- Health of a ServingTier for Argo CD. Healthy means: it can serve. The SLO is no part of it, or a traffic spike would
-- be a failed release; neither is a scale-up under way.
local health = {}

if obj.spec ~= nil and obj.spec.suspend then
  health.status = "Suspended"
  health.message = "spec.suspend is true"
  return health
end

if obj.status == nil or obj.status.conditions == nil or obj.status.observedGeneration ~= obj.metadata.generation then
  health.status = "Progressing"
  health.message = "the operator has not seen this version yet"
  return health
end

local conditions = {}
for _, condition in ipairs(obj.status.conditions) do
  conditions[condition.type] = condition
end

local function is(kind, status)
  return conditions[kind] ~= nil and conditions[kind].status == status
end

local function with(status, kind)
  health.status = status
  health.message = conditions[kind].reason .. ": " .. (conditions[kind].message or "")
  return health
end

if is("Accepted", "False") then
  return with("Degraded", "Accepted")
end
if is("Conflict", "True") then
  return with("Degraded", "Conflict")
end
if is("Stalled", "True") then
  return with("Degraded", "Stalled")
end
if is("Ready", "True") then
  return with("Healthy", "Ready")
end
if conditions["Ready"] ~= nil then
  return with("Progressing", "Ready")
end
health.status = "Progressing"
health.message = "the operator has not judged this tier yet"
return health
